// SPDX-License-Identifier: Apache-2.0
// Glue that blend_, multidot and gram share: lists of tensors of k models, cut into launches by what a kernel's
// arguments hold.
#pragma once
#include <vector>

#include "cuda/scope.h"

namespace zipfast {

// What else belongs to a tensor of the list, beside its k models.
inline void soup_joins(cuda::SoupList& list, int slot, const void* data, DType dtype) {
  if (list.same[slot] != uint8_t(dtype)) list.same[slot] = cuda::kMixed;
  list.aligned[slot] = list.aligned[slot] && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Calls `launch()` for runs of tensors of `x` = [models, count] that fit into one; `fill(slot, j)` sets what else
// belongs to tensor j.
template <class Fill, class Launch>
void soup_launches(const char* op, const std::vector<Tensor>& x, int64_t models, std::vector<Tensor>& keep,
                   cuda::SoupList& list, Fill&& fill, Launch&& launch) {
  const int64_t count = int64_t(x.size()) / models;
  STD_TORCH_CHECK(models <= cuda::kSoupPointers, op, ": at most ", cuda::kSoupPointers, " models, got ", models);
  list.models = int(models), list.stride = int(count);
  auto flush = [&] {
    if (list.tensors == 0) return;
    launch();
    list.tensors = 0, list.blocks = 0;
    keep.clear();  // torch's allocator reuses them in stream order
  };
  for (int64_t j = 0; j < count; ++j) {
    if (list.tensors == cuda::kSoupTensors || (list.tensors + 1) * models > cuda::kSoupPointers) flush();
    if (list.tensors == 0) list.column = int(j);
    const int slot = list.tensors++;
    const int64_t size = x[j].numel();
    list.tensor[slot] = {size, list.blocks};
    list.blocks += (size + cuda::kSoupPiece - 1) / cuda::kSoupPiece;
    list.same[slot] = uint8_t(dtype_of(op, x[j])), list.aligned[slot] = true;
    for (int64_t i = 0; i < models; ++i) {
      const Tensor& t = x[i * count + j];
      STD_TORCH_CHECK(t.numel() == size, op, ": malformed lists");
      keep.push_back(as_contiguous(t));
      list.x[slot * models + i] = keep.back().const_data_ptr();
      list.dtype[slot * models + i] = uint8_t(dtype_of(op, t));
      soup_joins(list, slot, list.x[slot * models + i], dtype_of(op, t));
    }
    fill(slot, j);
  }
  flush();
}

}  // namespace zipfast
