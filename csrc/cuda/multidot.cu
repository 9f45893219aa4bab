// SPDX-License-Identifier: Apache-2.0
// multidot on a GPU: <g_j, x_ij> for all models and tensors in two launches.
//
// A block owns kSoupPiece elements of one tensor: it reads its piece of g once per model from cache and every x once,
// sums products in float64 per thread and folds the threads in a fixed order; a second kernel adds the pieces in order.
// No atomics: equal on every run.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

__device__ inline double soup_value(const void* x, DType dtype, long long e) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(x)[e];
    case DType::f16:
      return widen(static_cast<const Half*>(x)[e]);
    case DType::bf16:
      return widen(static_cast<const BFloat16*>(x)[e]);
    default:
      return static_cast<const float*>(x)[e];
  }
}

}  // namespace

// part [blocks, models]
__global__ void multidot_part_kernel(const __grid_constant__ MultidotJob job) {
  __shared__ double lane[kSoupThreads];
  const SoupList& list = job.list;
  const SoupPlace place = soup_place(list, blockIdx.x);
  const void* g = job.g[place.tensor];
  const DType own = DType(job.g_dtype[place.tensor]);
  for (int i = 0; i < list.models; ++i) {
    const void* x = list.x[place.tensor * list.models + i];
    const DType dtype = DType(list.dtype[place.tensor * list.models + i]);
    double sum = 0;
    for (long long e = place.begin + threadIdx.x; e < place.end; e += kSoupThreads)
      sum += soup_value(g, own, e) * soup_value(x, dtype, e);
    lane[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kSoupThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) lane[threadIdx.x] += lane[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) job.part[(long long)blockIdx.x * list.models + i] = lane[0];
    __syncthreads();
  }
}

// One thread per (tensor, model): the pieces in order.
__global__ void multidot_add_kernel(const __grid_constant__ MultidotJob job) {
  const SoupList& list = job.list;
  const int at = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= list.tensors * list.models) return;
  const int tensor = at / list.models, i = at % list.models;
  const long long last = tensor + 1 < list.tensors ? list.tensor[tensor + 1].first : list.blocks;
  double sum = 0;
  for (long long p = list.tensor[tensor].first; p < last; ++p) sum += job.part[p * list.models + i];
  job.out[(long long)i * list.stride + list.column + tensor] = sum;
}

cudaError_t multidot(const MultidotJob& job, cudaStream_t stream) {
  const SoupList& list = job.list;
  if (list.blocks > 0) ZF_LAUNCH((multidot_part_kernel), unsigned(list.blocks), unsigned(kSoupThreads), 0, stream, job);
  const int sums = list.tensors * list.models;
  ZF_LAUNCH((multidot_add_kernel), unsigned((sums + kSoupThreads - 1) / kSoupThreads), unsigned(kSoupThreads), 0,
            stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
