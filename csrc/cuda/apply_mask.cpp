// SPDX-License-Identifier: Apache-2.0
// Glue of apply_mask_'s CUDA kernel.
#include <memory>

#include "cuda/masked.h"

namespace zipfast {
namespace {

void apply_mask_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& mask,
                     const std::vector<Tensor>& source) {
  const size_t count = out.size();
  STD_TORCH_CHECK(count > 0 && (mask.empty() || mask.size() == count) && (source.empty() || source.size() == count),
                  "apply_mask_: malformed lists");
  CudaScope scope(out[0]);
  const auto job = std::make_unique<cuda::ApplyJob>();
  std::vector<Tensor> keep;
  auto fill = [&](cuda::ApplyTensor& t, size_t j) {
    STD_TORCH_CHECK(out[j].is_contiguous(), "apply_mask_: 'out' must be contiguous");
    const DType dtype = dtype_of("apply_mask_", out[j]);
    t.out = out[j].mutable_data_ptr();
    t.source = t.out;
    if (!source.empty()) {
      STD_TORCH_CHECK(source[j].numel() == t.size && source[j].scalar_type() == out[j].scalar_type(),
                      "apply_mask_: malformed 'source'");
      keep.push_back(as_contiguous(source[j]));  // torch's allocator reuses it in stream order
      t.source = keep.back().const_data_ptr();
    }
    t.mask = mask_bits("apply_mask_", mask, j, t.size);
    t.width = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    t.aligned = aligned(t.out) && aligned(t.source);
  };
  masked_launches(
      *job, count, [&](size_t j) { return out[j].numel(); }, fill,
      [&] { check_launch("apply_mask_", cuda::apply_mask(*job, scope.stream)); });
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("apply_mask_", TORCH_BOX(&zipfast::apply_mask_cuda)); }
