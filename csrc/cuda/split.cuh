// SPDX-License-Identifier: Apache-2.0
// float32 numbers as two float16 ones, so that tensor cores can multiply them with float32 accuracy.
//
// x 2^k = hi + lo, with k one exponent for a feature and kSplitSamples samples in a row: the largest of them lies in
// [2^7, 2^8).  hi has 11 bits of x, lo the next 11 (its last bit is never coarser than 2^-24, 2^-31 of the largest), so
// that hi hi' + hi lo' + lo hi' is x x' 2^(k + k') to a relative 2^-22: three products of float16 numbers, each exact
// in float32.  As k belongs to so few samples, no number overflows, whatever came before, and nothing has to be known
// beforehand.  Sums over kSplitSamples samples are below 2^24; they are scaled back and added to float32 (or float64)
// registers, which round to nearest: the sums that tensor cores keep are cut off, and may not grow for longer.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace zipfast::cuda {

constexpr int kSplitSamples = 256;

// k for the largest magnitude among the samples; 0 where that is 0 or not finite.
__device__ inline int split_exponent(float largest) {
  const int biased = int(float_to_bits(largest) >> 23 & 0xffu);
  if (largest == 0 || biased == 0xff) return 0;
  const int k = 134 - biased;
  return k < 126 ? k : 126;
}

// 2^k for k in [-126, 127], what split_exponent gives and its negative.
__device__ inline float power_of_two(int k) { return bits_to_float(uint32_t(k + 127) << 23); }

// Two floats as float16, round to nearest even: `low` in the low half of the word.
__device__ inline uint32_t narrow_two(float low, float high) {
#ifdef ZF_EMU
  return uint32_t(narrow<Half>(low).bits) | uint32_t(narrow<Half>(high).bits) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

__device__ inline float widen_low(uint32_t two) {
#ifdef ZF_EMU
  return widen(Half{uint16_t(two)});
#else
  float x;
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x) : "r"(two));
  return x;
#endif
}
__device__ inline float widen_high(uint32_t two) { return widen_low(two >> 16); }

struct Split {
  uint32_t hi, lo;  // two numbers each
};

// Of two numbers that are scaled already.
__device__ inline Split split_two(float low, float high) {
  Split s;
  s.hi = narrow_two(low, high);
  s.lo = narrow_two(low - widen_low(s.hi), high - widen_high(s.hi));
  return s;
}

}  // namespace zipfast::cuda
