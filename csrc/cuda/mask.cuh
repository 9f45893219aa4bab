// SPDX-License-Identifier: Apache-2.0
// Eight weights at a time: what one byte of a packed mask speaks of.  16-byte accesses where tensors are aligned to
// them, single ones elsewhere and at a tensor's end.
#pragma once
#include "cuda/scope.cuh"

namespace zipfast::cuda {

constexpr int kMaskByte = 8;

template <class scalar_t>
struct alignas(16) Pack {
  scalar_t value[16 / sizeof(scalar_t)];
};

// x [n] of at most eight elements; `whole`: eight, aligned.
template <class scalar_t>
__device__ inline void load_eight(const scalar_t* x, int n, bool whole, scalar_t* out) {
  constexpr int kPack = 16 / sizeof(scalar_t);
  if (whole) {
    ZF_UNROLL
    for (int i = 0; i < kMaskByte / kPack; ++i) {
      const Pack<scalar_t> pack = reinterpret_cast<const Pack<scalar_t>*>(x)[i];
      ZF_UNROLL
      for (int e = 0; e < kPack; ++e) out[i * kPack + e] = pack.value[e];
    }
  } else {
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e) out[e] = e < n ? x[e] : scalar_t{};
  }
}
template <class scalar_t>
__device__ inline void store_eight(scalar_t* x, int n, bool whole, const scalar_t* value) {
  constexpr int kPack = 16 / sizeof(scalar_t);
  if (whole) {
    ZF_UNROLL
    for (int i = 0; i < kMaskByte / kPack; ++i) {
      Pack<scalar_t> pack;
      ZF_UNROLL
      for (int e = 0; e < kPack; ++e) pack.value[e] = value[i * kPack + e];
      reinterpret_cast<Pack<scalar_t>*>(x)[i] = pack;
    }
  } else {
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e)
      if (e < n) x[e] = value[e];
  }
}

__device__ inline unsigned mask_byte(const uint8_t* mask, long long at) { return mask ? mask[at / kMaskByte] : 0xffu; }

}  // namespace zipfast::cuda
