// SPDX-License-Identifier: Apache-2.0
// Glue of the CUDA kernels of sparse_linear, sparse_linear_input and sparse_linear_weight.
#include <string>

#include "cuda/scope.h"

namespace zipfast {
namespace {

// What all three share; `keep` holds what the job points at.
cuda::SparseJob job_of(const char* op, const Tensor& row_start, const Tensor& column, int64_t columns, int64_t batch,
                       std::vector<Tensor>& keep) {
  cuda::SparseJob job{};
  keep.push_back(as_contiguous(row_start));
  job.row_start = keep.back().const_data_ptr<int32_t>();
  keep.push_back(as_contiguous(column));
  job.column = keep.back().const_data_ptr();
  job.narrow = column.scalar_type() == ScalarType::Short;
  STD_TORCH_CHECK(row_start.numel() > 0 && (job.narrow || column.scalar_type() == ScalarType::Int), op,
                  ": malformed layout");
  job.rows = row_start.numel() - 1, job.alive = column.numel(), job.columns = columns, job.batch = batch;
  return job;
}

const void* data_of(const Tensor& t, std::vector<Tensor>& keep) {
  keep.push_back(as_contiguous(t));
  return keep.back().const_data_ptr();
}

void* scratch(const Tensor& like, int64_t size, std::vector<Tensor>& keep) {
  keep.push_back(torch::stable::new_empty(like, {size}));  // torch's allocator reuses it in stream order
  return keep.back().mutable_data_ptr();
}

// What the staged path must have and this job has not; null: it may run.
const char* why_not_staged(DType dtype, const cuda::SparseJob& job) {
  if (dtype == DType::f64) return "float32, float16 or bfloat16";
  if (job.order || !job.narrow) return "int16 columns";
  if (job.batch < 1 || job.batch > cuda::kSparseFew) return "1 to 16 samples";
  if (reinterpret_cast<uintptr_t>(job.column) % 16 != 0 || reinterpret_cast<uintptr_t>(job.value) % 16 != 0)
    return "'column' and 'value' that begin on 16 bytes";
  if (cuda::sparse_staged_samples(dtype, job.columns, job.batch) == 0) return "samples that fit in shared memory";
  return nullptr;
}

// Whether copying the input to shared memory pays, where it can be done.
bool staged_pays(const cuda::SparseJob& job) { return job.alive * cuda::kStagedSparsest >= job.rows * job.columns; }

Tensor multiply(const char* op, cuda::SparseJob& job, const Tensor& value, const Tensor& x,
                const std::optional<Tensor>& bias, std::vector<Tensor>& keep, const CudaScope& scope,
                const std::string& path = "gather") {
  STD_TORCH_CHECK(value.numel() == job.alive && value.scalar_type() == x.scalar_type() &&
                      x.numel() == job.batch * job.columns &&
                      (!bias || (bias->numel() == job.rows && bias->scalar_type() == x.scalar_type())),
                  op, ": malformed 'value', 'bias' or input");
  job.value = data_of(value, keep);
  job.bias = bias ? data_of(*bias, keep) : nullptr;
  job.x = data_of(x, keep);
  Tensor out = torch::stable::new_empty(x, {job.batch, job.rows});
  job.out = out.mutable_data_ptr();
  const DType dtype = dtype_of(op, x);
  const char* reason = path == "gather" ? "" : why_not_staged(dtype, job);
  STD_TORCH_CHECK(path != "staged" || !reason, op, ": path 'staged' must have ", reason ? reason : "");
  // The emulator (capability 0) takes it by name only.
  if (!reason && (path == "staged" || (scope.capability() >= 80 && staged_pays(job)))) {
    check_launch(op, cuda::sparse_linear_staged(dtype, job, scope.stream));
    return out;
  }
  if (job.batch > cuda::kSparseFew) job.packed_x = scratch(x, job.batch * job.columns, keep);
  check_launch(op, cuda::sparse_linear(dtype, job, scope.stream));
  return out;
}

Tensor sparse_linear_cuda(const Tensor& row_start, const Tensor& column, const Tensor& value, const Tensor& x,
                          const std::optional<Tensor>& bias, std::string path) {
  CudaScope scope(x);
  std::vector<Tensor> keep;
  cuda::SparseJob job = job_of("sparse_linear", row_start, column, x.size(1), x.size(0), keep);
  return multiply("sparse_linear", job, value, x, bias, keep, scope, path);
}

Tensor sparse_linear_input_cuda(const Tensor&, const Tensor& column, const Tensor& value,
                                const std::vector<Tensor>& transposed, const Tensor& grad, int64_t in_features) {
  STD_TORCH_CHECK(transposed.size() == 3,
                  "sparse_linear_input: 'transposed' must be what transpose_layout returns on a GPU, got ",
                  transposed.size(), " tensors");
  STD_TORCH_CHECK(transposed[0].numel() == in_features + 1 && transposed[1].numel() == column.numel() &&
                      transposed[2].numel() == column.numel(),
                  "sparse_linear_input: malformed 'transposed'");
  CudaScope scope(grad);
  std::vector<Tensor> keep;
  cuda::SparseJob job = job_of("sparse_linear_input", transposed[0], transposed[1], grad.size(1), grad.size(0), keep);
  keep.push_back(as_contiguous(transposed[2]));
  job.order = keep.back().const_data_ptr<int32_t>();
  return multiply("sparse_linear_input", job, value, grad, std::nullopt, keep, scope);
}

Tensor sparse_linear_weight_cuda(const Tensor& row_start, const Tensor& column, const Tensor& grad, const Tensor& x) {
  CudaScope scope(x);
  std::vector<Tensor> keep;
  cuda::SparseJob job = job_of("sparse_linear_weight", row_start, column, x.size(1), x.size(0), keep);
  STD_TORCH_CHECK(grad.numel() == job.batch * job.rows && grad.scalar_type() == x.scalar_type(),
                  "sparse_linear_weight: malformed 'grad'");
  job.grad = data_of(grad, keep);
  job.x = data_of(x, keep);
  if (job.batch > cuda::kSparseFew) {
    job.packed_x = scratch(x, job.batch * job.columns, keep);
    job.packed_grad = scratch(x, job.batch * job.rows, keep);
  }
  Tensor out = torch::stable::new_empty(x, {job.alive});
  job.out = out.mutable_data_ptr();
  check_launch("sparse_linear_weight",
               cuda::sparse_linear_weight(dtype_of("sparse_linear_weight", x), job, scope.stream));
  return out;
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) {
  m.impl("sparse_linear", TORCH_BOX(&zipfast::sparse_linear_cuda));
  m.impl("sparse_linear_input", TORCH_BOX(&zipfast::sparse_linear_input_cuda));
  m.impl("sparse_linear_weight", TORCH_BOX(&zipfast::sparse_linear_weight_cuda));
}
