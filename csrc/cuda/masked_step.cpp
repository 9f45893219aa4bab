// SPDX-License-Identifier: Apache-2.0
// Glue of masked_step_'s CUDA kernels.
#include <memory>
#include <string>

#include "cuda/masked.h"

namespace zipfast {
namespace {

void masked_step_cuda(const std::vector<Tensor>& param, const std::vector<Tensor>& first,
                      const std::vector<Tensor>& second, const std::vector<Tensor>& grad,
                      const std::vector<Tensor>& mask, std::string rule, int64_t step, double lr, double weight_decay,
                      double momentum, double dampening, bool nesterov, double beta1, double beta2, double eps,
                      bool maximize) {
  const rule::StepOptions options{rule != "sgd", rule == "adamw", nesterov,  maximize, step,  lr,
                                  weight_decay,  momentum,        dampening, beta1,    beta2, eps};
  const auto job = std::make_unique<cuda::StepJob>();
  job->wide = rule::step_rule<double>(options), job->single = rule::step_rule<float>(options);
  job->kind = rule::step_kind(options), job->flags = rule::step_flags(options);
  const size_t count = param.size();
  STD_TORCH_CHECK(count > 0 && grad.size() == count && (mask.empty() || mask.size() == count) &&
                      first.size() == (job->kind == rule::kStepPlain ? 0 : count) &&
                      second.size() == (job->kind == rule::kStepAdam ? count : 0),
                  "masked_step_: malformed lists");
  CudaScope scope(param[0]);
  std::vector<Tensor> keep;
  auto fill = [&](cuda::StepTensor& t, size_t j) {
    const DType dtype = dtype_of("masked_step_", param[j]);
    STD_TORCH_CHECK(param[j].is_contiguous(), "masked_step_: 'param' must be contiguous");
    STD_TORCH_CHECK(grad[j].numel() == t.size && grad[j].scalar_type() == param[j].scalar_type(),
                    "masked_step_: malformed 'grad'");
    keep.push_back(as_contiguous(grad[j]));  // torch's allocator reuses it in stream order
    t.param = param[j].mutable_data_ptr(), t.grad = keep.back().const_data_ptr();
    t.moment = t.square = nullptr;
    t.mask = mask_bits("masked_step_", mask, j, t.size);
    t.dtype = t.state = uint8_t(dtype);
    t.aligned = aligned(t.param) && aligned(t.grad);
    for (const auto* list : {&first, &second}) {
      if (list->empty()) continue;
      const Tensor& state = (*list)[j];
      const DType own = dtype_of("masked_step_", state);
      STD_TORCH_CHECK(state.numel() == t.size && state.is_contiguous() && own == dtype_of("masked_step_", first[j]) &&
                          (own == dtype || (own == DType::f32 && dtype != DType::f64)),
                      "masked_step_: malformed state");
      void* data = state.mutable_data_ptr();
      (list == &first ? t.moment : t.square) = data;
      t.state = uint8_t(own);
      t.aligned = t.aligned && aligned(data);
    }
  };
  masked_launches(
      *job, count, [&](size_t j) { return param[j].numel(); }, fill,
      [&] { check_launch("masked_step_", cuda::masked_step(*job, scope.stream)); });
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("masked_step_", TORCH_BOX(&zipfast::masked_step_cuda)); }
