// SPDX-License-Identifier: Apache-2.0
// gram on a GPU: k x k inner products of x_a - base, tensor by tensor, in two launches.
//
// A block owns kSoupPiece elements of one tensor and goes through them kWidth at a time: the differences of all models
// are formed once, into shared memory (float64), then the pairs a <= b are shared out over the threads, each adding its
// products in order to its own place in the block's part.  A second kernel adds the parts in order.  No atomics: equal
// on every run.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

constexpr int kShared = 5120;  // doubles: 40 KB

__device__ inline double gram_value(const void* x, DType dtype, long long e) {
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

// part [blocks, models, models], the upper triangle
__global__ void gram_part_kernel(const __grid_constant__ GramJob job) {
  __shared__ double row[kShared];
  const SoupList& list = job.list;
  const SoupPlace place = soup_place(list, blockIdx.x);
  const int models = list.models, most = kShared / models, width = most < 64 ? most : 64;
  const void* const* x = list.x + place.tensor * models;
  const uint8_t* dtype = list.dtype + place.tensor * models;
  const void* base = job.base[place.tensor];
  const DType base_dtype = DType(job.base_dtype[place.tensor]);
  const bool wide = job.wide[place.tensor];
  double* part = job.part + (long long)blockIdx.x * models * models;
  for (int pair = threadIdx.x; pair < models * models; pair += blockDim.x) part[pair] = 0;
  for (long long at = place.begin; at < place.end; at += width) {
    const int n = place.end - at < width ? int(place.end - at) : width;
    __syncthreads();
    for (int e = threadIdx.x; e < models * n; e += blockDim.x) {
      const int i = e / n, k = e % n;
      double value = gram_value(x[i], DType(dtype[i]), at + k);
      if (base) value -= gram_value(base, base_dtype, at + k);
      row[i * width + k] = wide ? value : double(float(value));
    }
    __syncthreads();
    for (int pair = threadIdx.x; pair < models * models; pair += blockDim.x) {
      const int a = pair / models, b = pair % models;
      if (a > b) continue;
      double sum = 0;
      for (int k = 0; k < n; ++k) sum += row[a * width + k] * row[b * width + k];
      part[pair] += sum;  // always by the same thread
    }
  }
}

// One thread per (tensor, a, b): the pieces in order, mirrored.
__global__ void gram_add_kernel(const __grid_constant__ GramJob job) {
  const SoupList& list = job.list;
  const long long square = (long long)list.models * list.models;
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= list.tensors * square) return;
  const int tensor = int(at / square), a = int(at % square) / list.models, b = int(at % square) % list.models;
  const int upper = a < b ? a * list.models + b : b * list.models + a;
  const long long last = tensor + 1 < list.tensors ? list.tensor[tensor + 1].first : list.blocks;
  double sum = 0;
  for (long long p = list.tensor[tensor].first; p < last; ++p) sum += job.part[p * square + upper];
  job.out[(list.column + tensor) * square + a * list.models + b] = sum;
}

cudaError_t gram(const GramJob& job, cudaStream_t stream) {
  const SoupList& list = job.list;
  if (list.blocks > 0) ZF_LAUNCH((gram_part_kernel), unsigned(list.blocks), unsigned(kSoupThreads), 0, stream, job);
  const long long sums = (long long)list.tensors * list.models * list.models;
  ZF_LAUNCH((gram_add_kernel), unsigned((sums + kSoupThreads - 1) / kSoupThreads), unsigned(kSoupThreads), 0, stream,
            job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
