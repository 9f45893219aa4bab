// SPDX-License-Identifier: Apache-2.0
// Glue of correlate's CUDA kernels: launches of up to kCorrelateSpaces spaces.
#include "cuda/scope.h"
#include "rule.h"

namespace zipfast {
namespace {

std::tuple<std::vector<Tensor>, Tensor> correlate_cuda(const std::vector<Tensor>& comoment,
                                                       const std::vector<Tensor>& total,
                                                       const std::vector<Tensor>& shift,
                                                       const std::vector<int64_t>& count, bool wide, bool pair_dead) {
  const size_t spaces = comoment.size();
  STD_TORCH_CHECK(spaces > 0 && total.size() == spaces && shift.size() == spaces && count.size() == spaces,
                  "correlate: malformed lists");
  CudaScope scope(comoment[0]);
  using torch::stable::new_empty;
  const DType dtype = wide ? DType::f64 : DType::f32;
  std::vector<Tensor> found, keep;
  Tensor status = new_empty(comoment[0], {int64_t(spaces), int64_t(rule::kCorrelateFields)}, ScalarType::Long);
  auto* note = reinterpret_cast<long long*>(status.mutable_data_ptr<int64_t>());
  check_launch("correlate", cuda::correlate_begin({note, (long long)(spaces)}, scope.stream));

  auto data = [&](const Tensor& t) {
    keep.push_back(as_contiguous(t));
    return keep.back().const_data_ptr<double>();
  };
  cuda::CorrelateJob job{};
  auto flush = [&] {
    job.pair_dead = pair_dead;
    check_launch("correlate", cuda::correlate(dtype, job, scope.stream));
    job = {};
  };
  for (size_t i = 0; i < spaces; ++i) {
    const int64_t n = total[i].numel();
    STD_TORCH_CHECK(comoment[i].dim() == 2 && comoment[i].size(0) == n && comoment[i].size(1) == n &&
                        shift[i].numel() == n && count[i] > 0 && n < (1 << 21),
                    "correlate: malformed space");
    found.push_back(new_empty(comoment[i], {n, n}, wide ? ScalarType::Double : ScalarType::Float));
    const int64_t tiles = rule::triangle_tiles((n + cuda::kCorrelateTile - 1) / cuda::kCorrelateTile);
    if (job.spaces == cuda::kCorrelateSpaces || job.blocks + tiles > INT32_MAX) flush();
    if (n == 0) continue;
    cuda::CorrelateSpace& s = job.space[job.spaces++];
    s.comoment = data(comoment[i]), s.total = data(total[i]), s.shift = data(shift[i]);
    s.out = found.back().mutable_data_ptr();
    s.status = note + int64_t(i) * rule::kCorrelateFields;
    s.share = 1 / double(count[i]);
    s.n = int(n), s.block = job.blocks;
    const auto start = reinterpret_cast<uintptr_t>(s.comoment) | reinterpret_cast<uintptr_t>(s.out);
    s.aligned = n % 4 == 0 && start % 16 == 0;
    job.blocks += int(tiles);
  }
  flush();
  return {std::move(found), status};
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("correlate", TORCH_BOX(&zipfast::correlate_cuda)); }
