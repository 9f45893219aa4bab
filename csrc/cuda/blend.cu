// SPDX-License-Identifier: Apache-2.0
// blend_ on a GPU: one launch for many tensors of k models (Wortsman et al. 2022, section 2).
//
// A block owns kSoupPiece elements of one tensor and runs over the models innermost, so that every input is read once,
// coalesced.  Terms are rounded before they are added (this file is compiled without fused multiply-add), model after
// model: the bits of the C++ kernel.  Values that are not finite are looked for only where a result is not.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

template <class acc_t>
__device__ inline acc_t value_at(const void* x, DType dtype, long long e) {
  switch (dtype) {
    case DType::f64:
      return acc_t(static_cast<const double*>(x)[e]);
    case DType::f16:
      return acc_t(widen(static_cast<const Half*>(x)[e]));
    case DType::bf16:
      return acc_t(widen(static_cast<const BFloat16*>(x)[e]));
    default:
      return acc_t(static_cast<const float*>(x)[e]);
  }
}

// The value as it is stored, widened again.
template <class acc_t>
__device__ inline double store(void* out, DType dtype, long long e, acc_t value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(out)[e] = double(value);
      return double(value);
    case DType::f16: {
      const Half half = narrow<Half>(double(value));
      static_cast<Half*>(out)[e] = half;
      return widen(half);
    }
    case DType::bf16: {
      const BFloat16 half = narrow<BFloat16>(double(value));
      static_cast<BFloat16*>(out)[e] = half;
      return widen(half);
    }
    default:
      static_cast<float*>(out)[e] = float(value);
      return float(value);
  }
}

template <class acc_t>
__device__ inline void blend_piece(const BlendJob& job, int tensor, long long begin, long long end) {
  const SoupList& list = job.list;
  const int models = list.models;
  const void* const* x = list.x + tensor * models;
  const uint8_t* dtype = list.dtype + tensor * models;
  const double* weight = job.weight + list.column + tensor;
  long long* bad = job.bad + list.column + tensor;
  for (long long e = begin + threadIdx.x; e < end; e += blockDim.x) {
    acc_t sum = 0;
    bool clean = true;
    for (int i = 0; i < models; ++i) {
      const acc_t term = value_at<acc_t>(x[i], DType(dtype[i]), e) * acc_t(weight[(long long)i * list.stride]);
      sum = i ? sum + term : term;
    }
    // Which inputs are to blame is asked before the result may replace one of them.
    if (!(sum - sum == 0)) {
      for (int i = 0; i < models; ++i) {
        const double own = value_at<double>(x[i], DType(dtype[i]), e);
        if (!(own - own == 0)) {
          clean = false;
          atomicMin(bad + (long long)i * list.stride, e);
        }
      }
    }
    const double stored = store(job.out[tensor], DType(job.target[tensor]), e, sum);
    if (clean && !(stored - stored == 0)) atomicMin(bad + (long long)models * list.stride, e);
  }
}

}  // namespace

__global__ void blend_sum_kernel(const __grid_constant__ BlendJob job) {
  const SoupPlace place = soup_place(job.list, blockIdx.x);
  if (job.wide[place.tensor])
    blend_piece<double>(job, place.tensor, place.begin, place.end);
  else
    blend_piece<float>(job, place.tensor, place.begin, place.end);
}

cudaError_t blend(const BlendJob& job, cudaStream_t stream) {
  if (job.list.blocks == 0) return cudaSuccess;
  ZF_LAUNCH((blend_sum_kernel), unsigned(job.list.blocks), unsigned(kSoupThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
