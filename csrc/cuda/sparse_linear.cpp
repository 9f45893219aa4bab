#include "cuda/scope.h"
