// SPDX-License-Identifier: Apache-2.0
// Glue that apply_mask_ and masked_step_ share: lists of tensors with packed masks, cut into launches.
#pragma once
#include <cstdint>
#include <vector>

#include "cuda/scope.h"
#include "packed.h"

namespace zipfast {

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls `launch()` for runs of `count` tensors; `fill(entry, j)` sets what belongs to tensor j of `size(j)` elements.
template <class Job, class Size, class Fill, class Launch>
void masked_launches(Job& job, size_t count, Size&& size, Fill&& fill, Launch&& launch) {
  job.tensors = 0, job.blocks = 0;
  for (size_t j = 0; j < count; ++j) {
    auto& entry = job.tensor[job.tensors++];
    entry.size = size(j), entry.first = job.blocks;
    fill(entry, j);
    job.blocks += (entry.size + cuda::kSoupPiece - 1) / cuda::kSoupPiece;
    if (job.tensors == cuda::kSoupTensors || j + 1 == count) {
      launch();
      job.tensors = 0, job.blocks = 0;
    }
  }
}

}  // namespace zipfast
