// SPDX-License-Identifier: Apache-2.0
// Glue of threshold's CUDA kernels: tensors in the order of their groups, cut into launches by what a kernel's
// arguments hold; every pass goes over all of them before the next one begins.
#include <algorithm>
#include <memory>

#include "cuda/scope.h"

namespace zipfast {
namespace {

int bits_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return rule::Magnitude<double>::kBits;
    case DType::f16:
    case DType::bf16:
      return rule::Magnitude<Half>::kBits;
    default:
      return rule::Magnitude<float>::kBits;
  }
}

std::tuple<std::vector<Tensor>, Tensor> threshold_cuda(const std::vector<Tensor>& score,
                                                       const std::vector<Tensor>& mask,
                                                       const std::vector<int64_t>& drop,
                                                       const std::vector<int64_t>& group) {
  const size_t count = score.size(), groups = drop.size();
  STD_TORCH_CHECK(count > 0 && groups > 0 && group.size() == count && (mask.empty() || mask.size() == count),
                  "threshold: malformed lists");
  CudaScope scope(score[0]);
  using torch::stable::new_empty;
  std::vector<size_t> order(count);
  for (size_t j = 0; j < count; ++j) {
    STD_TORCH_CHECK(group[j] >= 0 && size_t(group[j]) < groups, "threshold: malformed 'group'");
    order[j] = j;
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return group[a] < group[b]; });

  std::vector<Tensor> keep, kept;
  for (const Tensor& t : score) kept.push_back(new_empty(t, {64 * ((t.numel() + 511) / 512)}, ScalarType::Byte));
  std::vector<cuda::ThresholdGroup> state(groups);
  std::vector<std::unique_ptr<cuda::ThresholdJob>> jobs;
  int64_t blocks = 0;
  int most = 1;
  for (size_t g = 0, at = 0; g < groups; ++g) {
    state[g].drop = drop[g], state[g].first = blocks, state[g].bits = rule::Magnitude<Half>::kBits;
    const size_t begin = at;
    for (; at < count && size_t(group[order[at]]) == g; ++at) {
      const size_t j = order[at];
      const DType dtype = dtype_of("threshold", score[j]);
      STD_TORCH_CHECK(dtype == dtype_of("threshold", score[order[begin]]), "threshold: mixed dtypes in a group");
      state[g].bits = bits_of(dtype);
      const int64_t size = score[j].numel(), pieces = (size + cuda::kThresholdPiece - 1) / cuda::kThresholdPiece;
      if (size == 0) continue;
      if (jobs.empty() || jobs.back()->tensors == cuda::kThresholdTensors) {
        jobs.push_back(std::make_unique<cuda::ThresholdJob>());
        jobs.back()->column = blocks;
      }
      cuda::ThresholdJob& job = *jobs.back();
      cuda::ThresholdTensor& t = job.tensor[job.tensors++];
      keep.push_back(as_contiguous(score[j]));
      t.data = keep.back().const_data_ptr();
      if (!mask.empty()) {
        STD_TORCH_CHECK(mask[j].scalar_type() == ScalarType::Byte && mask[j].numel() == kept[j].numel(),
                        "threshold: malformed 'mask'");
        keep.push_back(as_contiguous(mask[j]));
        t.mask = keep.back().const_data_ptr<uint8_t>();
      }
      t.kept = reinterpret_cast<uint32_t*>(kept[j].mutable_data_ptr<uint8_t>());
      t.size = size, t.first = job.blocks, t.index = int(j), t.group = int(g), t.dtype = dtype;
      job.blocks += pieces, blocks += pieces, state[g].blocks += pieces;
    }
    most = std::max(most, rule::threshold_passes(state[g].bits));
  }

  const auto many = int64_t(groups);
  Tensor status = new_empty(score[0], {int64_t(count) + many}, ScalarType::Long);
  Tensor bin = new_empty(score[0], {many * rule::kThresholdBins}, ScalarType::Long);
  Tensor part = new_empty(score[0], {std::max<int64_t>(blocks, 1)}, ScalarType::Long);
  Tensor device = new_empty(score[0], {many * int64_t(sizeof(cuda::ThresholdGroup))}, ScalarType::Byte);
  cuda::ThresholdGroups all{};
  all.state = reinterpret_cast<cuda::ThresholdGroup*>(device.mutable_data_ptr<uint8_t>());
  all.bin = reinterpret_cast<unsigned long long*>(bin.mutable_data_ptr<int64_t>());
  all.part = reinterpret_cast<long long*>(part.mutable_data_ptr<int64_t>());
  auto* note = reinterpret_cast<long long*>(status.mutable_data_ptr<int64_t>());
  all.survivors = note + count;
  all.groups = int(groups);
  auto launch = [](cudaError_t e) { check_launch("threshold", e); };
  const auto begin = std::make_unique<cuda::ThresholdBegin>();
  begin->state = all.state, begin->bin = all.bin, begin->status = note, begin->tensors = int(count);
  for (size_t g = 0; g < groups; g += cuda::kThresholdGroups) {
    begin->first = int(g), begin->groups = int(std::min<size_t>(cuda::kThresholdGroups, groups - g));
    std::copy_n(state.begin() + int64_t(g), begin->groups, begin->group);
    launch(cuda::threshold_begin(*begin, scope.stream));
  }
  for (const auto& job : jobs) job->state = all.state, job->bin = all.bin, job->part = all.part, job->status = note;
  for (int pass = 0; pass < most; ++pass) {
    for (const auto& job : jobs) launch(cuda::threshold_count(*job, pass, scope.stream));
    launch(cuda::threshold_pick(all, pass, scope.stream));
  }
  for (const auto& job : jobs) launch(cuda::threshold_ties(*job, scope.stream));
  launch(cuda::threshold_share(all, scope.stream));
  for (const auto& job : jobs) launch(cuda::threshold_write(*job, scope.stream));
  return {std::move(kept), status};
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("threshold", TORCH_BOX(&zipfast::threshold_cuda)); }
