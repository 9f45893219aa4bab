// SPDX-License-Identifier: Apache-2.0
// Glue of multidot's CUDA kernels.
#include <memory>

#include "cuda/soup.h"

namespace zipfast {
namespace {

Tensor multidot_cuda(const std::vector<Tensor>& g, const std::vector<Tensor>& x) {
  const int64_t count = int64_t(g.size());
  STD_TORCH_CHECK(count > 0 && !x.empty() && int64_t(x.size()) % count == 0, "multidot: malformed lists");
  const int64_t models = int64_t(x.size()) / count;
  CudaScope scope(g[0]);
  using torch::stable::new_empty;
  Tensor out = new_empty(g[0], {models, count}, ScalarType::Double);
  const auto job = std::make_unique<cuda::MultidotJob>();
  job->out = out.mutable_data_ptr<double>();
  std::vector<Tensor> keep;
  auto fill = [&](int slot, int64_t j) {
    STD_TORCH_CHECK(g[j].numel() == x[j].numel(), "multidot: malformed 'g'");
    keep.push_back(as_contiguous(g[j]));
    job->g[slot] = keep.back().const_data_ptr();
    job->g_dtype[slot] = uint8_t(dtype_of("multidot", g[j]));
    soup_joins(job->list, slot, job->g[slot], dtype_of("multidot", g[j]));
  };
  soup_launches("multidot", x, models, keep, job->list, fill, [&] {
    const Tensor part = new_empty(g[0], {std::max<int64_t>(job->list.blocks, 1) * models}, ScalarType::Double);
    job->part = part.mutable_data_ptr<double>();
    check_launch("multidot", cuda::multidot(*job, scope.stream));
  });
  return out;
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("multidot", TORCH_BOX(&zipfast::multidot_cuda)); }
