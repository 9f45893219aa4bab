// SPDX-License-Identifier: Apache-2.0
// Glue of zip_match's CUDA kernel: outputs of all spaces in four tensors, launches of up to kMatchSpaces spaces.
#include "cuda/scope.h"
#include "rule.h"

namespace zipfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> zip_match_cuda(const std::vector<Tensor>& sim, int64_t models,
                                                          const std::vector<int64_t>& keep,
                                                          const std::vector<int64_t>& budget, double alpha,
                                                          bool compat) {
  const int64_t spaces = int64_t(sim.size());
  STD_TORCH_CHECK(spaces > 0 && keep.size() == sim.size() && budget.size() == sim.size() && models > 0 && models < 32,
                  "zip_match: malformed arguments");
  CudaScope scope(sim[0]);
  const DType dtype = dtype_of("zip_match", sim[0]);
  int64_t features = 0, merges = 0, largest = 0;
  for (int64_t s = 0; s < spaces; ++s) {
    const int64_t n = sim[s].size(0);
    STD_TORCH_CHECK(sim[s].dim() == 2 && n == sim[s].size(1) && n > 0 && n % models == 0 && n < (1 << 30) &&
                        keep[s] >= 1 && keep[s] <= n,
                    "zip_match: malformed similarity");
    features += n;
    merges += n - keep[s];
    largest = std::max(largest, n);
  }
  using torch::stable::new_empty;
  Tensor group = new_empty(sim[0], {features}, ScalarType::Long);
  Tensor pair = new_empty(sim[0], {merges, 2}, ScalarType::Long);
  Tensor value = new_empty(sim[0], {merges});
  Tensor status = new_empty(sim[0], {spaces, int64_t(rule::kStatusFields)}, ScalarType::Long);
  Tensor scratch = new_empty(sim[0], {cuda::zip_match_scratch(dtype, largest)}, ScalarType::Byte);

  std::vector<Tensor> input;
  cuda::MatchJob job{};
  auto flush = [&] {
    if (job.spaces == 0) return;
    job.scratch = scratch.mutable_data_ptr();
    job.alpha = alpha, job.models = int(models), job.largest = int(largest), job.compat = compat;
    check_launch("zip_match", cuda::zip_match(dtype, job, scope.stream));
    job = {};
  };
  int64_t feature = 0, merge = 0;
  const int64_t value_bytes = dtype == DType::f64 ? 8 : 4;
  for (int64_t s = 0; s < spaces; ++s) {
    if (job.spaces == cuda::kMatchSpaces) flush();
    input.push_back(as_contiguous(sim[s]));
    const int64_t n = sim[s].size(0);
    job.space[job.spaces++] = {input.back().const_data_ptr(),
                               group.mutable_data_ptr<int64_t>() + feature,
                               pair.mutable_data_ptr<int64_t>() + 2 * merge,
                               static_cast<char*>(value.mutable_data_ptr()) + value_bytes * merge,
                               status.mutable_data_ptr<int64_t>() + s * rule::kStatusFields,
                               budget[s],
                               int(n),
                               int(keep[s])};
    feature += n;
    merge += n - keep[s];
  }
  flush();
  return {group, pair, value, status};
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("zip_match", TORCH_BOX(&zipfast::zip_match_cuda)); }
