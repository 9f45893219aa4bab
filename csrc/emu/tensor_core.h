// SPDX-License-Identifier: Apache-2.0
// What a warp's matrix instructions do, lane by lane, as the PTX ISA lays fragments out.  Sums are cut off to float32
// towards zero after every instruction, as tensor cores do it, so that a kernel that lets them grow for too long shows.
#pragma once
#include "../dtype.h"
#include "cuda_emu.h"

namespace cuda_emu {

inline float cut_off(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.f) : nearest;
}

// Every lane shows `mine` and copies what `take(lane, all)` wants of the others'.
template <class T, class F>
inline void show(const T& mine, F take) {
  static_assert(sizeof(T) <= 16);
  EMU_TSAN(EmuIgnore ign;)
  Warp& w = blk->w[blk->cur->linear / 32];
  const int lane = blk->cur->linear % 32;
  std::memcpy(w.slot[lane], &mine, sizeof(T));
  syncwarp(~0u);
  take(lane, [&](int other) {
    T value;
    std::memcpy(&value, w.slot[other], sizeof(T));
    return value;
  });
  syncwarp(~0u);
}

struct Words4 {
  uint32_t w[4];
};
struct Words2 {
  uint32_t w[2];
};
template <class half_t>
inline float half_of(uint32_t word, int which) {
  return zipfast::widen(half_t{uint16_t(which ? word >> 16 : word)});
}

}  // namespace cuda_emu

namespace zipfast::cuda {

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const char* rows[4];
  cuda_emu::show(static_cast<const char*>(row), [&](int lane, auto&& of) {
    for (int m = 0; m < 4; ++m) rows[m] = of(8 * m + lane / 4) + 4 * (lane % 4);
  });
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], rows[m], 4);
  __syncwarp();  // what was read may be written again by another lane
}

template <class half_t>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using cuda_emu::half_of;
  cuda_emu::Words4 rows[4];
  cuda_emu::show(cuda_emu::Words4{{a[0], a[1], a[2], a[3]}}, [&](int lane, auto&& of) {
    for (int q = 0; q < 4; ++q) rows[q] = of(lane / 4 * 4 + q);
  });
  cuda_emu::Words2 columns[2][4];
  cuda_emu::show(cuda_emu::Words2{{b0, b1}}, [&](int lane, auto&& of) {
    for (int c = 0; c < 2; ++c)
      for (int q = 0; q < 4; ++q) columns[c][q] = of((2 * (lane % 4) + c) * 4 + q);
  });
  for (int i = 0; i < 4; ++i) {  // d: rows lane / 4 and 8 below, two columns each
    double sum = d[i];
    for (int half = 0; half < 2; ++half)
      for (int q = 0; q < 4; ++q)
        for (int e = 0; e < 2; ++e)
          sum +=
              double(half_of<half_t>(rows[q].w[i / 2 + 2 * half], e)) * half_of<half_t>(columns[i % 2][q].w[half], e);
    d[i] = cuda_emu::cut_off(sum);
  }
}

}  // namespace zipfast::cuda
