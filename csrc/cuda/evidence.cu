// SPDX-License-Identifier: Apache-2.0
// evidence on a GPU (You et al. 2021, section 4; the steps themselves are in rule.h).
//
// A block owns kEvidenceLanes outputs of one problem and runs all their rounds: no second launch, no host read.
//   diagonal      a column of kRows threads per output; each adds every kRows-th term of the six sums, the columns are
//                 folded in shared memory in a fixed order.  z is read as rows of 32 outputs: coalesced.
//   tridiagonal   one thread per output walks the recurrence over k; pivots and right-hand sides lie in global scratch,
//                 [k, outputs], coalesced over the outputs.
// No atomics, a fixed order of addition: equal on every run.  Cost per round: k / kRows divisions in a row
// (tridiagonal: 3 k), z read once (from L2 after the first round).
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

#ifdef ZF_EMU
constexpr int kEvidenceRows = 2;  // as few fibers as still show a missing barrier
#else
constexpr int kEvidenceRows = 16;
#endif

namespace {

using rule::EvidenceLane;
using rule::EvidenceSums;

// Which problem of the job a block works on.
__device__ inline const EvidenceProblem& evidence_problem(const EvidenceJob& job) {
  int i = 0;
  while (i + 1 < job.problems && int(blockIdx.x) >= job.problem[i + 1].block) ++i;
  return job.problem[i];
}

__device__ inline double not_negative(double x) { return x <= 0 ? 0 : x; }  // NaN stays

template <bool kLogdet>
__device__ inline EvidenceSums diagonal_part(const EvidenceProblem& p, long long output, double t) {
  EvidenceSums s;
  const double inverse = 1 / t;
  for (long long i = threadIdx.y; i < p.k; i += kEvidenceRows) {
    const double own = not_negative(p.diagonal[i]), z = p.projected[i * p.outputs + output];
    const double q = 1 / (own + t), shrunk = own * q, y = z * q, y2 = y * y;
    s.gamma += shrunk;
    s.curve += shrunk * q;
    s.gain += z * y;
    s.energy += y2;
    s.bend += y2 * q;
    if (kLogdet) s.logdet += log1p(own * inverse);
  }
  return s;
}

// See csrc/cpu/evidence.cpp for the recurrences.
template <bool kLogdet>
__device__ inline EvidenceSums tridiagonal_sums(const EvidenceProblem& p, long long output, double t) {
  EvidenceSums s;
  double* pivot = p.scratch + output;
  double* work = p.scratch + p.k * p.outputs + output;
  const double inverse = 1 / t;
  double slope = 0, turn = 0, trace = 0, trace2 = 0, last = 1, right = 0;
  for (long long i = 0; i < p.k; ++i) {
    double d = p.diagonal[i] + t, first = 1, second = 0, z = p.projected[i * p.outputs + output];
    if (i > 0) {
      const double off = p.offdiagonal[i - 1], factor = off / last, ratio = factor * factor;
      d -= factor * off;
      z -= factor * right;
      first += ratio * slope;
      second = ratio * (turn - 2 * slope * slope / last);
    }
    last = d < t ? t : d;
    right = z;
    slope = first, turn = second;
    pivot[i * p.outputs] = last;
    work[i * p.outputs] = right;
    const double q = 1 / last, log_slope = slope * q;
    trace += log_slope;
    trace2 += log_slope * log_slope - turn * q;
    s.gain += right * right * q;
    if (kLogdet) s.logdet += log(last * inverse);
  }
  double m = 0;
  for (long long i = p.k - 1; i >= 0; --i) {
    double rest = work[i * p.outputs];
    if (i + 1 < p.k) rest -= p.offdiagonal[i] * m;
    m = rest / pivot[i * p.outputs];
    work[i * p.outputs] = m;
    s.energy += m * m;
  }
  double before = 0;
  for (long long i = 0; i < p.k; ++i) {
    double rest = work[i * p.outputs];
    if (i > 0) rest -= p.offdiagonal[i - 1] / pivot[(i - 1) * p.outputs] * before;
    s.bend += rest * rest / pivot[i * p.outputs];
    before = rest;
  }
  s.gamma = double(p.k) - t * trace;
  s.curve = trace - t * trace2;
  return s;
}

// The sums of this thread's output; valid in the threads of row 0.  Contains two barriers.
template <bool kTridiagonal, bool kLogdet>
__device__ inline EvidenceSums block_sums(const EvidenceProblem& p, long long output, double t, double* part) {
  EvidenceSums s;
  if (kTridiagonal) return output < p.outputs ? tridiagonal_sums<kLogdet>(p, output, t) : s;
  if (output < p.outputs) s = diagonal_part<kLogdet>(p, output, t);
  constexpr int kStride = kEvidenceLanes * kEvidenceRows;  // of one sum; lanes side by side: no bank conflict
  double* own = part + threadIdx.y * kEvidenceLanes + threadIdx.x;
  own[0] = s.gamma, own[kStride] = s.curve, own[2 * kStride] = s.gain;
  own[3 * kStride] = s.energy, own[4 * kStride] = s.bend, own[5 * kStride] = s.logdet;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int row = 1; row < kEvidenceRows; ++row) {
      const double* other = own + row * kEvidenceLanes;
      s.gamma += other[0], s.curve += other[kStride], s.gain += other[2 * kStride];
      s.energy += other[3 * kStride], s.bend += other[4 * kStride], s.logdet += other[5 * kStride];
    }
  }
  __syncthreads();  // `part` may be written again
  return s;
}

}  // namespace

template <bool kTridiagonal>
__global__ void __launch_bounds__(kEvidenceLanes* kEvidenceRows) evidence_solve_kernel(const EvidenceJob job) {
  __shared__ double part[kTridiagonal ? 1 : 6 * kEvidenceLanes * kEvidenceRows];
  __shared__ double ratio[kEvidenceLanes], trace;
  const EvidenceProblem& p = evidence_problem(job);
  const long long output = (long long)(int(blockIdx.x) - p.block) * kEvidenceLanes + threadIdx.x;
  const bool leader = threadIdx.y == 0 && output < p.outputs;

  if (threadIdx.y == 0) {  // one warp, a fixed order
    double sum = 0;
    for (long long i = threadIdx.x; i < p.k; i += 32) sum += not_negative(p.diagonal[i]);
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (threadIdx.x == 0) trace = sum;
  }
  __syncthreads();
  rule::EvidenceRule r = p.rule;
  r.trace = trace;

  EvidenceLane lane;
  lane.done = true;
  if (leader) lane = rule::evidence_begin(r, p.square[output]);
  bool busy = __syncthreads_or(!lane.done);
  if (r.mode == rule::kExact && busy) {
    for (int point = 0; point < rule::kScanPoints; ++point) {
      const EvidenceSums s = block_sums<kTridiagonal, true>(p, output, rule::evidence_scan(r, point), part);
      if (!lane.done) rule::evidence_offer(r, lane, point, s);
    }
  }
  while (busy) {
    if (threadIdx.y == 0) ratio[threadIdx.x] = lane.t;
    __syncthreads();
    const EvidenceSums s = block_sums<kTridiagonal, false>(p, output, ratio[threadIdx.x], part);
    if (!lane.done) rule::evidence_step(r, lane, s);
    busy = __syncthreads_or(!lane.done);
  }
  if (threadIdx.y == 0) ratio[threadIdx.x] = lane.t;
  __syncthreads();
  const EvidenceSums s = block_sums<kTridiagonal, true>(p, output, ratio[threadIdx.x], part);
  __syncthreads();
  if (leader) {
    double one[rule::kEvidenceValues];
    rule::evidence_finish(r, lane, s, one);
    const long long at = p.first + output;
    for (int v = 0; v < rule::kEvidenceValues; ++v) job.value[v * job.all + at] = one[v];
    job.status[rule::kSteps * job.all + at] = lane.steps;
    job.status[rule::kConverged * job.all + at] = lane.converged;
    job.status[rule::kCode * job.all + at] = lane.code;
    ratio[threadIdx.x] = one[rule::kRatio];
  }
  if (!p.mean) return;
  __syncthreads();
  if (output >= p.outputs) return;
  const double t = ratio[threadIdx.x];
  const bool finite = t <= 1.7976931348623157e308;
  if (kTridiagonal) {
    if (finite) tridiagonal_sums<false>(p, output, t);  // leaves the mean in the scratch
    const double* work = p.scratch + p.k * p.outputs + output;
    for (long long i = 0; i < p.k; ++i) p.mean[i * p.outputs + output] = finite ? work[i * p.outputs] : 0;
  } else {
    for (long long i = threadIdx.y; i < p.k; i += kEvidenceRows) {
      const double z = p.projected[i * p.outputs + output];
      p.mean[i * p.outputs + output] = finite ? z / (not_negative(p.diagonal[i]) + t) : 0;
    }
  }
}

cudaError_t evidence(const EvidenceJob& job, cudaStream_t stream) {
  if (job.blocks == 0) return cudaSuccess;
  if (job.tridiagonal)
    ZF_LAUNCH((evidence_solve_kernel<true>), unsigned(job.blocks), dim3(kEvidenceLanes, 1), 0, stream, job);
  else
    ZF_LAUNCH((evidence_solve_kernel<false>), unsigned(job.blocks), dim3(kEvidenceLanes, kEvidenceRows), 0, stream,
              job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
