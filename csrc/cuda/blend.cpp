// SPDX-License-Identifier: Apache-2.0
// Glue of blend_'s CUDA kernel.
#include <memory>

#include "cuda/soup.h"

namespace zipfast {
namespace {

void blend_cuda(const std::vector<Tensor>& out, Tensor bad, const std::vector<Tensor>& x, const Tensor& weight_) {
  const int64_t count = int64_t(out.size());
  STD_TORCH_CHECK(count > 0 && !x.empty() && int64_t(x.size()) % count == 0, "blend_: malformed lists");
  const int64_t models = int64_t(x.size()) / count;
  CudaScope scope(out[0]);
  const Tensor weight = as_contiguous(weight_);
  STD_TORCH_CHECK(weight.numel() == models * count && bad.numel() == (models + 1) * count && bad.is_contiguous(),
                  "blend_: malformed 'weight' or 'bad'");
  const auto job = std::make_unique<cuda::BlendJob>();
  job->weight = weight.const_data_ptr<double>();
  job->bad = reinterpret_cast<long long*>(bad.mutable_data_ptr<int64_t>());
  std::vector<Tensor> keep;
  auto fill = [&](int slot, int64_t j) {
    STD_TORCH_CHECK(out[j].is_contiguous() && out[j].numel() == x[j].numel(), "blend_: malformed 'out'");
    const DType target = dtype_of("blend_", out[j]);
    job->out[slot] = out[j].mutable_data_ptr();
    job->target[slot] = uint8_t(target);
    soup_joins(job->list, slot, job->out[slot], target);
    bool wide = target == DType::f64;
    for (int64_t i = 0; i < models; ++i) wide |= DType(job->list.dtype[slot * models + i]) == DType::f64;
    job->wide[slot] = wide;
  };
  soup_launches("blend_", x, models, keep, job->list, fill,
                [&] { check_launch("blend_", cuda::blend(*job, scope.stream)); });
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("blend_", TORCH_BOX(&zipfast::blend_cuda)); }
