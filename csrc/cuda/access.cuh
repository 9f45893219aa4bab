// SPDX-License-Identifier: Apache-2.0
// Groups of consecutive elements that one thread reads or writes at once: in accesses of 16 bytes where they are whole
// and aligned to them, one by one elsewhere and at a tensor's end.  Threads that lie beside each other should take
// groups of 16 bytes, so that a warp's access fills its sectors of memory.
#pragma once
#include <type_traits>

#include "cuda/scope.cuh"

namespace zipfast::cuda {

// Elements of a group of 16 bytes.
template <class scalar_t>
constexpr int kGroup = 16 / int(sizeof(scalar_t));

// x [kCount] in accesses of 16 bytes (8, where that is all).  The emulator, which has no such accesses, refuses what a
// GPU would.
template <int kCount, class scalar_t>
__device__ inline void load_whole(const scalar_t* x, scalar_t* out) {
  constexpr int kBytes = kCount * int(sizeof(scalar_t));
#ifdef ZF_EMU
  if (reinterpret_cast<uintptr_t>(x) % (kBytes < 16 ? kBytes : 16)) cuda_emu::die("misaligned load of a group");
  memcpy(out, x, kBytes);
#else
  using words_t = std::conditional_t<(kBytes < 16), uint2, uint4>;
  words_t words[kBytes / sizeof(words_t)];
  ZF_UNROLL
  for (int i = 0; i < kBytes / int(sizeof(words_t)); ++i) words[i] = reinterpret_cast<const words_t*>(x)[i];
  memcpy(out, words, kBytes);
#endif
}
template <int kCount, class scalar_t>
__device__ inline void store_whole(scalar_t* x, const scalar_t* value) {
  constexpr int kBytes = kCount * int(sizeof(scalar_t));
#ifdef ZF_EMU
  if (reinterpret_cast<uintptr_t>(x) % (kBytes < 16 ? kBytes : 16)) cuda_emu::die("misaligned store of a group");
  memcpy(x, value, kBytes);
#else
  // By name: the compiler would merge plain stores with those of the other branch and take them apart.
  uint32_t word[kBytes / 4];
  memcpy(word, value, kBytes);
  const size_t to = __cvta_generic_to_global(x);
  if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(word[0]), "r"(word[1]) : "memory");
  } else {
    ZF_UNROLL
    for (int i = 0; i < kBytes / 4; i += 4)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + 4 * i), "r"(word[i]), "r"(word[i + 1]),
                   "r"(word[i + 2]), "r"(word[i + 3])
                   : "memory");
  }
#endif
}

// x [n], n <= kCount, zeros behind it; `whole`: n is kCount and x aligned (where a group is worth such an access).
template <int kCount, class scalar_t>
__device__ inline void load_group(const scalar_t* x, int n, bool whole, scalar_t* out) {
  if constexpr (kCount * sizeof(scalar_t) >= 8) {
    if (whole) return load_whole<kCount>(x, out);
  }
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e) out[e] = e < n ? x[e] : scalar_t{};
}
template <int kCount, class scalar_t>
__device__ inline void store_group(scalar_t* x, int n, bool whole, const scalar_t* value) {
  if constexpr (kCount * sizeof(scalar_t) >= 8) {
    if (whole) return store_whole<kCount>(x, value);
  }
  ZF_UNROLL
  for (int e = 0; e < kCount; ++e)
    if (e < n) x[e] = value[e];
}

}  // namespace zipfast::cuda
