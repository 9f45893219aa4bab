// SPDX-License-Identifier: Apache-2.0
// Packed masks on the CPU: one bit per weight in flat order, lowest bit first, 1 = alive, read in words of 32 weights.
#pragma once
#include <cstring>

#include "cpu/simd.h"
#include "packed.h"

namespace zipfast {

constexpr int64_t kMaskWord = 32;
constexpr uint32_t kAllAlive = ~0u;

// The word of weights `at` and following, `at` a multiple of 32; what lies beyond the tensor is padding.
ZF_INLINE uint32_t mask_word(const uint8_t* mask, int64_t at) {
  if (mask == nullptr) return kAllAlive;
  uint32_t word;
  memcpy(&word, mask + at / 8, sizeof word);
  return word;
}

}  // namespace zipfast
