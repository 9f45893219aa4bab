// SPDX-License-Identifier: Apache-2.0
// Glue of gram's CUDA kernels.
#include <memory>
#include <string>

#include "cuda/soup.h"

namespace zipfast {
namespace {

Tensor gram_cuda(const std::vector<Tensor>& x, int64_t models, const std::vector<Tensor>& base, std::string path) {
  STD_TORCH_CHECK(models > 0 && models <= 256 && !x.empty() && int64_t(x.size()) % models == 0,
                  "gram: malformed lists");
  const int64_t count = int64_t(x.size()) / models;
  STD_TORCH_CHECK(base.empty() || int64_t(base.size()) == count, "gram: malformed 'base'");
  CudaScope scope(x[0]);
  const bool tensor = path == "auto" ? cuda::gram_by_tensor_cores(scope.capability(), models) : path == "tensor";
  using torch::stable::new_empty;
  Tensor out = new_empty(x[0], {count, models, models}, ScalarType::Double);
  const auto job = std::make_unique<cuda::GramJob>();
  job->out = out.mutable_data_ptr<double>();
  std::vector<Tensor> keep;
  auto fill = [&](int slot, int64_t j) {
    bool wide = false;
    job->base[slot] = nullptr;
    job->base_dtype[slot] = uint8_t(DType::f32);
    if (!base.empty()) {
      STD_TORCH_CHECK(base[j].numel() == x[j].numel(), "gram: malformed 'base'");
      keep.push_back(as_contiguous(base[j]));
      job->base[slot] = keep.back().const_data_ptr();
      job->base_dtype[slot] = uint8_t(dtype_of("gram", base[j]));
      wide = DType(job->base_dtype[slot]) == DType::f64;
      soup_joins(job->list, slot, job->base[slot], DType(job->base_dtype[slot]));
    }
    for (int64_t i = 0; i < models; ++i) wide |= DType(job->list.dtype[slot * models + i]) == DType::f64;
    job->wide[slot] = wide;
  };
  soup_launches("gram", x, models, keep, job->list, fill, [&] {
    const int64_t blocks = std::max<int64_t>(job->list.blocks, 1);
    const Tensor part = new_empty(x[0], {blocks * models * (models + 1) / 2}, ScalarType::Double);
    job->part = part.mutable_data_ptr<double>();
    check_launch("gram", cuda::gram(*job, tensor, scope.stream));
  });
  return out;
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("gram", TORCH_BOX(&zipfast::gram_cuda)); }
