// SPDX-License-Identifier: Apache-2.0
// Glue of threshold's CUDA kernels: a table of tensors in the order of their groups, copied to the device by the
// kernels' arguments, and one allocation for all that lies between the launches.
#include <algorithm>
#include <memory>

#include "cuda/scope.h"

namespace zipfast {
namespace {

// Parts of one allocation, each aligned to 16 bytes: measured first, then taken.
class Parts {
 public:
  explicit Parts(uint8_t* base) : base_(base) {}
  template <class T>
  void take(T*& part, int64_t count) {
    if (base_) part = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

int64_t lay_out(cuda::ThresholdJob& job, uint8_t* base) {
  const int64_t spans = int64_t(job.pieces) * cuda::kThresholdSpans, candidates = spans * cuda::kThresholdCandidates;
  Parts parts(base);
  parts.take(job.table, job.rows);
  parts.take(job.state, job.groups);
  parts.take(job.total, job.groups);
  parts.take(job.bin, int64_t(job.groups) * rule::kThresholdBins);
  parts.take(job.key, candidates * job.width);
  parts.take(job.place, candidates);
  parts.take(job.count, spans);
  parts.take(job.ties, spans);
  parts.take(job.row, job.pieces);
  parts.take(job.last, cuda::kThresholdBlocks);
  parts.take(job.ticket, 1);
  parts.take(job.passes, 1);
  return parts.used();
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
  std::vector<cuda::ThresholdTensor> table;
  std::vector<size_t> start{0};  // of each group, in the table
  cuda::ThresholdJob job{};
  job.width = sizeof(uint32_t);
  int64_t pieces = 0;
  for (size_t g = 0, at = 0; g < groups; ++g) {
    int64_t before = 0;
    for (const size_t begin = at; at < count && size_t(group[order[at]]) == g; ++at) {
      const size_t j = order[at];
      const DType dtype = dtype_of("threshold", score[j]);
      STD_TORCH_CHECK(dtype == dtype_of("threshold", score[order[begin]]), "threshold: mixed dtypes in a group");
      const int64_t size = score[j].numel();
      if (size == 0) continue;
      if (dtype == DType::f64) job.width = sizeof(uint64_t);
      cuda::ThresholdTensor t{};
      keep.push_back(as_contiguous(score[j]));
      t.data = keep.back().const_data_ptr();
      t.aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
      if (!mask.empty()) {
        STD_TORCH_CHECK(mask[j].scalar_type() == ScalarType::Byte && mask[j].numel() == kept[j].numel(),
                        "threshold: malformed 'mask'");
        keep.push_back(as_contiguous(mask[j]));
        t.mask = keep.back().const_data_ptr<uint8_t>();
      }
      t.kept = reinterpret_cast<uint32_t*>(kept[j].mutable_data_ptr<uint8_t>());
      t.size = size, t.before = before, t.first = int(pieces), t.index = int(j), t.group = int(g);
      t.dtype = uint8_t(dtype);
      table.push_back(t);
      before += size, pieces += (size + cuda::kThresholdPiece - 1) / cuda::kThresholdPiece;
      STD_TORCH_CHECK(pieces < (int64_t(1) << 31) / cuda::kThresholdSpans, "threshold: malformed lists");
    }
    start.push_back(table.size());
  }

  Tensor status = new_empty(score[0], {int64_t(count + groups)}, ScalarType::Long);
  job.status = reinterpret_cast<long long*>(status.mutable_data_ptr<int64_t>());
  job.rows = int(table.size()), job.groups = int(groups), job.inputs = int(count), job.pieces = int(pieces);
  Tensor scratch = new_empty(score[0], {lay_out(job, nullptr)}, ScalarType::Byte);
  lay_out(job, scratch.mutable_data_ptr<uint8_t>());

  auto launch = [](cudaError_t e) { check_launch("threshold", e); };
  const auto begin = std::make_unique<cuda::ThresholdBegin>();
  const int row_launches = (job.rows + cuda::kThresholdTensors - 1) / cuda::kThresholdTensors;
  const int group_launches = (job.groups + cuda::kThresholdGroups - 1) / cuda::kThresholdGroups;
  const int launches = std::max(row_launches, group_launches);
  begin->job = job;
  for (int l = 0; l < launches; ++l) {
    begin->row = std::min(l * cuda::kThresholdTensors, job.rows);
    begin->rows = std::min(cuda::kThresholdTensors, job.rows - begin->row);
    std::copy_n(table.begin() + begin->row, begin->rows, begin->tensor);
    begin->first = std::min(l * cuda::kThresholdGroups, job.groups);
    begin->groups = std::min(cuda::kThresholdGroups, job.groups - begin->first);
    for (int g = 0; g < begin->groups; ++g) {
      const size_t at = size_t(begin->first + g);
      begin->group[g] = {drop[at], int(start[at]), int(start[at + 1] - start[at])};
    }
    launch(cuda::threshold_begin(*begin, scope.stream));
  }
  if (launches > 1) launch(cuda::threshold_bracket(job, scope.stream));
  if (pieces > 0) {
    launch(cuda::threshold_collect(job, scope.stream));
    launch(cuda::threshold_finish(job, scope.stream));
  }
  return {std::move(kept), status};
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("threshold", TORCH_BOX(&zipfast::threshold_cuda)); }
