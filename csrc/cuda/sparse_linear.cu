#include "cuda/scope.cuh"
