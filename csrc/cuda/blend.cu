// SPDX-License-Identifier: Apache-2.0
// blend_ on a GPU: one launch for many tensors of k models (Wortsman et al. 2022, section 2).
//
// A block owns kSoupPiece elements of one tensor, a thread a group of them at a time: 16 bytes of each model, several
// models in flight, models innermost, so that every input is read once.  Terms are rounded before they are added (this
// file is compiled without fused multiply-add), model after model: the bits of the C++ kernel.  Values that are not
// finite are looked for only where a result is not.
#include "cuda/soup.cuh"

namespace zipfast::cuda {

namespace {

__device__ inline double value_at(const void* x, DType dtype, long long at) {
  double value = 0;
  with_type(dtype, [&](auto* tag) { value = widen(static_cast<const std::remove_pointer_t<decltype(tag)>*>(x)[at]); });
  return value;
}

// Elements [at, at + n) of a tensor; kWhole: a whole group, aligned.
template <class acc_t, class Type, bool kWhole>
__device__ inline void blend_group(const BlendJob& job, int tensor, long long at, int n) {
  constexpr int kCount = Type::kCount, kAtOnce = kWhole ? Type::kAtOnce : 1;
  const SoupList& list = job.list;
  const int models = list.models;
  const void* const* x = list.x + tensor * models;
  const uint8_t* dtype = list.dtype + tensor * models;
  const double* weight = job.weight + list.column + tensor;
  long long* bad = job.bad + list.column + tensor;
  if (kWhole) n = kCount;
  acc_t sum[kCount];
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e) sum[e] = acc_t(-0.0);  // adds nothing, not even to the sign of a zero
  for (int i = 0; i < models; i += kAtOnce) {
    uint32_t word[kAtOnce][Type::kWords] = {};
    double factor[kAtOnce] = {};
    ZF_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      if (i + u >= models) continue;
      Type::fetch(x[i + u], DType(dtype[i + u]), at, n, kWhole, word[u]);
      factor[u] = weight[(long long)(i + u) * list.stride];
    }
    ZF_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      if (i + u >= models) break;
      acc_t value[kCount];
      Type::open(word[u], DType(dtype[i + u]), value);
      ZF_UNROLL
      for (int e = 0; e < kCount; ++e) sum[e] += value[e] * acc_t(factor[u]);
    }
  }
  bool finite = true;
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e) finite = finite && (e >= n || sum[e] - sum[e] == 0);
  unsigned dirty = 0;
  if (!finite) {  // which inputs are to blame is asked before the result may replace one of them
    for (int i = 0; i < models; ++i) {
      for (int e = 0; e < n; ++e) {
        const double own = value_at(x[i], DType(dtype[i]), at + e);
        if (!(own - own == 0)) {
          dirty |= 1u << e;
          atomicMin(bad + (long long)i * list.stride, at + e);
        }
      }
    }
  }
  Type::store(job.out[tensor], DType(job.target[tensor]), at, n, kWhole, sum);
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e)
    if (e < n && !(sum[e] - sum[e] == 0) && !(dirty >> e & 1)) atomicMin(bad + (long long)models * list.stride, at + e);
}

template <class acc_t, class Type>
__device__ inline void blend_piece(const BlendJob& job, const SoupPlace& place) {
  constexpr int kCount = Type::kCount;
  long long at = place.begin + (long long)threadIdx.x * kCount;
  if (job.list.aligned[place.tensor])
    for (; at + kCount <= place.end; at += kSoupThreads * kCount)
      blend_group<acc_t, Type, true>(job, place.tensor, at, kCount);
  for (; at < place.end; at += kSoupThreads * kCount)
    blend_group<acc_t, Type, false>(job, place.tensor, at, int(place.end - at < kCount ? place.end - at : kCount));
}

}  // namespace

__global__ void __launch_bounds__(kSoupThreads, 3) blend_sum_kernel(const __grid_constant__ BlendJob job) {
  const SoupPlace place = soup_place(job.list, blockIdx.x);
  switch (job.list.same[place.tensor]) {
    case uint8_t(DType::f32):
      return blend_piece<float, OneType<float>>(job, place);
    case uint8_t(DType::f64):
      return blend_piece<double, OneType<double>>(job, place);
    case uint8_t(DType::f16):
      return blend_piece<float, OneType<Half>>(job, place);
    case uint8_t(DType::bf16):
      return blend_piece<float, OneType<BFloat16>>(job, place);
    default:
      if (job.wide[place.tensor]) return blend_piece<double, AnyType>(job, place);
      return blend_piece<float, AnyType>(job, place);
  }
}

cudaError_t blend(const BlendJob& job, cudaStream_t stream) {
  if (job.list.blocks == 0) return cudaSuccess;
  ZF_LAUNCH((blend_sum_kernel), unsigned(job.list.blocks), unsigned(kSoupThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
