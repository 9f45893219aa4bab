// SPDX-License-Identifier: Apache-2.0
// How the kernels over tensors of k models read them: groups of elements, of a dtype known when compiled or of any, as
// raw words first.  A thread asks for the words of kAtOnce models before it uses one, so that their loads overlap.
#pragma once
#include "cuda/access.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

// f with a null pointer of the storage type, on the device.  Threads of a block have one dtype at a time: no
// divergence.
template <class F>
__device__ inline void with_type(DType dtype, F&& f) {
  if (dtype == DType::f32)
    f(static_cast<float*>(nullptr));
  else if (dtype == DType::bf16)
    f(static_cast<BFloat16*>(nullptr));
  else if (dtype == DType::f16)
    f(static_cast<Half*>(nullptr));
  else
    f(static_cast<double*>(nullptr));
}

template <class scalar_t, int kCount, class acc_t>
__device__ inline void widen_group(const uint32_t* word, acc_t* out) {
  scalar_t value[kCount];
  memcpy(value, word, sizeof value);
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e) out[e] = acc_t(widen(value[e]));
}

// Writes values and leaves in them what was stored.
template <class scalar_t, int kCount, class acc_t>
__device__ inline void narrow_group(scalar_t* out, int n, bool whole, acc_t* value) {
  scalar_t stored[kCount];
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e) stored[e] = narrow<scalar_t>(double(value[e]));
  store_group<kCount>(out, n, whole, stored);
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e) value[e] = acc_t(widen(stored[e]));
}

// All that belongs to a tensor has one dtype: groups of 16 bytes.
template <class scalar_t>
struct OneType {
  static constexpr int kCount = kGroup<scalar_t>, kWords = 4, kAtOnce = 4;
  __device__ static inline void fetch(const void* x, DType, long long at, int n, bool whole, uint32_t* word) {
    scalar_t value[kCount];
    load_group<kCount>(static_cast<const scalar_t*>(x) + at, n, whole, value);
    memcpy(word, value, sizeof value);
  }
  template <class acc_t>
  __device__ static inline void open(const uint32_t* word, DType, acc_t* out) {
    widen_group<scalar_t, kCount>(word, out);
  }
  template <class acc_t>
  __device__ static inline void store(void* out, DType, long long at, int n, bool whole, acc_t* value) {
    narrow_group<scalar_t, kCount>(static_cast<scalar_t*>(out) + at, n, whole, value);
  }
};

// Dtypes differ: groups of four elements, 8 to 32 bytes.
struct AnyType {
  static constexpr int kCount = 4, kWords = 8, kAtOnce = 2;
  __device__ static inline void fetch(const void* x, DType dtype, long long at, int n, bool whole, uint32_t* word) {
    with_type(dtype, [&](auto* tag) {
      using scalar_t = std::remove_pointer_t<decltype(tag)>;
      scalar_t value[kCount];
      load_group<kCount>(static_cast<const scalar_t*>(x) + at, n, whole, value);
      memcpy(word, value, sizeof value);
    });
  }
  template <class acc_t>
  __device__ static inline void open(const uint32_t* word, DType dtype, acc_t* out) {
    with_type(dtype, [&](auto* tag) { widen_group<std::remove_pointer_t<decltype(tag)>, kCount>(word, out); });
  }
  template <class acc_t>
  __device__ static inline void store(void* out, DType dtype, long long at, int n, bool whole, acc_t* value) {
    with_type(dtype, [&](auto* tag) {
      using scalar_t = std::remove_pointer_t<decltype(tag)>;
      narrow_group<scalar_t, kCount>(static_cast<scalar_t*>(out) + at, n, whole, value);
    });
  }
};

// Every lane's sum, in a tree of fixed shape; valid in every lane.
__device__ inline double warp_sum(double value) {
  ZF_UNROLL
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// x[first] + x[first + kStep] + ... in order, up to x[n - 1].
template <int kStep>
__device__ inline double strided_sum(const double* x, long long n, int first) {
  constexpr int kInFlight = 8;
  double sum = 0;
  for (long long p = first; p < n; p += kInFlight * kStep) {
    double value[kInFlight];
    ZF_UNROLL
    for (int u = 0; u < kInFlight; ++u) value[u] = p + u * kStep < n ? x[p + u * kStep] : 0;
    ZF_UNROLL
    for (int u = 0; u < kInFlight; ++u) sum += value[u];
  }
  return sum;
}

}  // namespace zipfast::cuda
