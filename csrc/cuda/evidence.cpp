// SPDX-License-Identifier: Apache-2.0
// Glue of evidence's CUDA kernel: results of all problems in three tensors, launches of up to kEvidenceProblems.
#include "cuda/scope.h"
#include "rule.h"

namespace zipfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> evidence_cuda(const std::vector<Tensor>& diagonal,
                                                 const std::vector<Tensor>& offdiagonal,
                                                 const std::vector<Tensor>& projected,
                                                 const std::vector<Tensor>& square, const std::vector<int64_t>& samples,
                                                 const std::vector<int64_t>& features, int64_t mode, double tol,
                                                 int64_t max_iter, double eps, double floor, bool mean) {
  const size_t problems = diagonal.size();
  STD_TORCH_CHECK(problems > 0 && projected.size() == problems && square.size() == problems &&
                      samples.size() == problems && features.size() == problems &&
                      (offdiagonal.empty() || offdiagonal.size() == problems),
                  "evidence: malformed lists");
  CudaScope scope(diagonal[0]);
  const bool tridiagonal = !offdiagonal.empty();
  int64_t all = 0, entries = 0, packed = 0;
  for (size_t i = 0; i < problems; ++i) {
    const int64_t k = diagonal[i].size(0), outputs = square[i].size(0);
    STD_TORCH_CHECK(projected[i].dim() == 2 && projected[i].size(0) == k && projected[i].size(1) == outputs &&
                        (!tridiagonal || offdiagonal[i].size(0) == std::max<int64_t>(k - 1, 0)),
                    "evidence: malformed problem");
    STD_TORCH_CHECK(k <= INT32_MAX && outputs <= INT32_MAX, "evidence: a problem of more than 2^31 rows or outputs");
    all += outputs, entries += k * outputs;
    packed += outputs * cuda::evidence_rows(k, cuda::evidence_team(tridiagonal, k, outputs));
  }
  using torch::stable::new_empty;
  Tensor value = new_empty(diagonal[0], {int64_t(rule::kEvidenceValues), all}, ScalarType::Double);
  Tensor status = new_empty(diagonal[0], {int64_t(rule::kEvidenceStatus), all}, ScalarType::Long);
  Tensor means = new_empty(diagonal[0], {mean ? entries : 0}, ScalarType::Double);
  Tensor scratch = new_empty(diagonal[0], {packed}, ScalarType::Double);

  std::vector<Tensor> keep;
  auto data = [&](const Tensor& t) {
    keep.push_back(as_contiguous(t));
    return keep.back().const_data_ptr<double>();
  };
  cuda::EvidenceJob job{};
  auto flush = [&] {
    job.value = value.mutable_data_ptr<double>();
    job.status = reinterpret_cast<long long*>(status.mutable_data_ptr<int64_t>());
    job.all = all;
    job.tolerance = tol, job.epsilon = eps, job.floor = floor;
    job.mode = int(mode), job.most = int(std::min<int64_t>(max_iter, INT32_MAX));
    job.tridiagonal = tridiagonal;
    check_launch("evidence", cuda::evidence(job, scope.stream));
    job = {};
  };
  int64_t first = 0, entry = 0, place = 0;
  for (size_t i = 0; i < problems; ++i) {
    if (job.problems == cuda::kEvidenceProblems) flush();
    const int64_t k = diagonal[i].size(0), outputs = square[i].size(0);
    cuda::EvidenceProblem& p = job.problem[job.problems++];
    p.diagonal = data(diagonal[i]);
    p.offdiagonal = tridiagonal ? data(offdiagonal[i]) : nullptr;
    p.projected = data(projected[i]);
    p.square = data(square[i]);
    p.mean = mean ? means.mutable_data_ptr<double>() + entry : nullptr;
    p.scratch = scratch.mutable_data_ptr<double>() + place;
    p.samples = double(samples[i]), p.features = double(features[i]);
    p.first = first;
    p.k = int(k), p.outputs = int(outputs);
    p.block = job.blocks;
    p.team = cuda::evidence_team(tridiagonal, k, outputs);
    job.blocks += int(cuda::evidence_blocks(tridiagonal, outputs, p.team));
    first += outputs, entry += k * outputs, place += outputs * cuda::evidence_rows(k, p.team);
  }
  flush();
  return {value, status, means};
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("evidence", TORCH_BOX(&zipfast::evidence_cuda)); }
