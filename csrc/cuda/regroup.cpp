// SPDX-License-Identifier: Apache-2.0
// Glue of regroup's CUDA kernel.
#include "cuda/scope.h"

namespace zipfast {
namespace {

Tensor regroup_cuda(const std::vector<Tensor>& x, const Tensor& order_, const Tensor& start_,
                    const std::optional<Tensor>& divisor_, int64_t axis) {
  STD_TORCH_CHECK(!x.empty() && x.size() <= size_t(cuda::kRegroupPointers), "regroup: 'x' must hold 1 to ",
                  cuda::kRegroupPointers, " tensors, got ", x.size());
  CudaScope scope(x[0]);
  const AxisView view(x[0], axis);
  cuda::RegroupJob job{};
  std::vector<Tensor> input;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x[0].dim(); ++d) shape.push_back(x[0].size(d));
  for (size_t m = 0; m < x.size(); ++m) {
    STD_TORCH_CHECK(x[m].numel() == x[0].numel() && x[m].scalar_type() == x[0].scalar_type(), "regroup: malformed 'x'");
    input.push_back(as_contiguous(x[m]));
    job.x[m] = input.back().const_data_ptr();
  }
  const Tensor order = as_contiguous(order_), start = as_contiguous(start_);
  std::optional<Tensor> divisor;
  if (divisor_) divisor = as_contiguous(*divisor_);
  const int64_t groups = start.size(0) - 1;
  STD_TORCH_CHECK(groups >= 0 && (!divisor || divisor->numel() == groups), "regroup: malformed 'start' or 'divisor'");
  shape[axis] = groups;
  Tensor out = torch::stable::new_empty(x[0], shape);
  job.order = order.const_data_ptr<int64_t>();
  job.start = start.const_data_ptr<int64_t>();
  job.divisor = divisor ? divisor->const_data_ptr<double>() : nullptr;
  job.out = out.mutable_data_ptr();
  job.outer = view.outer, job.size = view.size, job.inner = view.inner;
  job.aligned = reinterpret_cast<uintptr_t>(job.out) % 16 == 0;
  for (size_t m = 0; m < x.size(); ++m) job.aligned &= reinterpret_cast<uintptr_t>(job.x[m]) % 16 == 0;
  job.groups = groups, job.members = order.size(0), job.models = int64_t(x.size());
  check_launch("regroup", cuda::regroup(dtype_of("regroup", x[0]), job, scope.stream));
  return out;
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("regroup", TORCH_BOX(&zipfast::regroup_cuda)); }
