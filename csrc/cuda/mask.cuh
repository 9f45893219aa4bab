// SPDX-License-Identifier: Apache-2.0
// The bits of a packed mask that belong to one thread: its kSoupEach weights in groups of kCount, each group beside
// those of the other threads.  They are read before anything else, all at once, so that no weight waits for its own.
#pragma once
#include "cuda/access.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

// Bit q kCount + e speaks of element e of group q, which begins at begin + (q kSoupThreads + threadIdx.x) kCount.
template <int kCount>
__device__ inline unsigned mask_of_thread(const uint8_t* mask, long long begin, long long end) {
  constexpr unsigned kAll = (1u << kCount) - 1;
  if (!mask) return (1u << kSoupEach) - 1;
  unsigned bits = 0;
  ZF_UNROLL
  for (int q = 0; q < kSoupEach / kCount; ++q) {
    const long long at = begin + (long long)(q * kSoupThreads + int(threadIdx.x)) * kCount;
    if (at < end) bits |= (unsigned(mask[at / 8]) >> int(at % 8) & kAll) << q * kCount;
  }
  return bits;
}

}  // namespace zipfast::cuda
