// SPDX-License-Identifier: Apache-2.0
// evidence on a GPU (You et al. 2021, section 4; the steps themselves are in rule.h).
//
// An output belongs to a team of 1 to 512 threads of one block, by the problem's shape alone: many where outputs are
// few.  A block runs all rounds of its outputs: no second launch, no host read.
//   diagonal      each thread adds every size-th term of the sums; the team folds them.
//   tridiagonal   each thread eliminates the rows of its own stretch of S + t but the last; what is left couples the
//   last
//                 row to that of the stretch before, and two neighbours join by eliminating the row between them: a
//                 tree of log2(size) levels (nested dissection, so a Cholesky factorisation of a permuted matrix).
//                 Numbers are polynomials in t, cut after the wanted power: with G(t) = z^T (S + t)^-1 z and the
//                 pivots' product D(t), -G' = |m|^2, G''/2 = m^T (S + t)^-1 m, (ln D)' and (ln D)'' are the traces of
//                 (S + t)^-1 and of -its square.  One sweep yields all six sums, and nothing is stored on the way.
// Every round asks for the powers it needs: the scan none, the fixed point one, Newton two.  No atomics, fixed trees of
// additions: equal on every run.  A round reads z once, as the block packed it: rows of a team side by side.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

#include <cstring>

namespace zipfast::cuda {
namespace {

using rule::EvidenceLane;
using rule::EvidenceSums;

__device__ inline const EvidenceProblem& evidence_problem(const EvidenceJob& job) {
  return job.problem[rule::entry_of<&EvidenceProblem::block>(job.problem, job.problems, blockIdx.x)];
}

__device__ inline double not_negative(double x) { return x <= 0 ? 0 : x; }  // NaN stays

// What a thread works for.
struct Place {
  int size, lane, index;  // threads of the team, this one among them, the team among the block's
  long long output;
  const double* z;  // this thread's packed rows, `size` apart
  bool leader;      // of a team with an output
};

// A product as mantissa in [1, 2) and exponent: the logarithm of k factors costs one logarithm.
struct Product {
  double mantissa;
  int exponent;

  __device__ void operator*=(double factor) {  // in [1, 2^1022)
    mantissa *= factor;
    long long bits;
    memcpy(&bits, &mantissa, sizeof bits);
    exponent += int(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffLL) | 0x3ff0000000000000LL;
    memcpy(&mantissa, &bits, sizeof bits);
  }
  __device__ void operator*=(const Product& other) {
    *this *= other.mantissa;
    exponent += other.exponent;
  }
  __device__ double logarithm() const { return log(mantissa) + 0.6931471805599453 * exponent; }
};

__device__ inline double from_right(double x, int step, int width) {
  return __shfl_down_sync(kFullWarp, x, unsigned(step), width);
}
__device__ inline Product from_right(const Product& x, int step, int width) {
  return {from_right(x.mantissa, step, width), __shfl_down_sync(kFullWarp, x.exponent, unsigned(step), width)};
}

// Joins the parts of a team from left to right; valid in its first thread.  `scratch` holds a part for each warp of the
// block; contains a barrier where the block's teams are wider than a warp.
template <class Part>
__device__ inline void team_join(Part& part, const Place& at, Part* scratch, double t) {
  const int width = at.size < 32 ? at.size : 32;
  for (int step = 1; step < width; step *= 2) {
    const Part other = part.from_right(step, width);
    if (at.lane % (2 * step) == 0) part.join(other, t);
  }
  if (at.size <= 32) return;  // the same in all of the block
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = part;
  __syncthreads();
  if (at.lane == 0)
    for (int warp = 1; warp < at.size / 32; ++warp) part.join(scratch[threadIdx.x / 32 + warp], t);
}

// ---------------------------------------------------------------------------------------------------------- diagonal

template <int kOrder, bool kLogdet>
struct Terms {
  double gain, gamma, energy, curve, bend;
  Product determinant;

  __device__ Terms from_right(int step, int width) const {
    Terms o{};
    o.gain = cuda::from_right(gain, step, width);
    if (kOrder > 0) o.gamma = cuda::from_right(gamma, step, width), o.energy = cuda::from_right(energy, step, width);
    if (kOrder > 1) o.curve = cuda::from_right(curve, step, width), o.bend = cuda::from_right(bend, step, width);
    if (kLogdet) o.determinant = cuda::from_right(determinant, step, width);
    return o;
  }
  __device__ void join(const Terms& o, double) {
    gain += o.gain;
    if (kOrder > 0) gamma += o.gamma, energy += o.energy;
    if (kOrder > 1) curve += o.curve, bend += o.bend;
    if (kLogdet) determinant *= o.determinant;
  }
};

template <int kOrder, bool kLogdet>
__device__ inline EvidenceSums diagonal_sums(const EvidenceProblem& p, const Place& at, double t, bool idle,
                                             double* memory) {
  Terms<kOrder, kLogdet> s{};
  s.determinant.mantissa = 1;
  const double inverse = 1 / t;
  const double* z = at.z;
  for (int i = idle ? p.k : at.lane; i < p.k; i += at.size, z += at.size) {
    const double own = not_negative(p.diagonal[i]), q = 1 / (own + t), shrunk = own * q, y = *z * q, y2 = y * y;
    s.gain += *z * y;
    if (kOrder > 0) s.gamma += shrunk, s.energy += y2;
    if (kOrder > 1) s.curve += shrunk * q, s.bend += y2 * q;
    if (kLogdet) s.determinant *= 1 + own * inverse;
  }
  team_join(s, at, reinterpret_cast<Terms<kOrder, kLogdet>*>(memory), t);
  return {s.gamma, s.curve, s.gain, s.energy, s.bend, kLogdet ? s.determinant.logarithm() : 0};
}

// ------------------------------------------------------------------------------------------------------- tridiagonal

// A polynomial in t up to the power kOrder.
template <int kOrder>
struct Series {
  double c[kOrder + 1];

  __device__ static Series of(double value, double slope = 0) {
    Series s{};
    s.c[0] = value;
    if constexpr (kOrder > 0) s.c[1] = slope;
    return s;
  }
  __device__ Series operator*(const Series& o) const {
    Series s;
    s.c[0] = c[0] * o.c[0];
    if constexpr (kOrder > 0) s.c[1] = c[0] * o.c[1] + c[1] * o.c[0];
    if constexpr (kOrder > 1) s.c[2] = c[0] * o.c[2] + c[1] * o.c[1] + c[2] * o.c[0];
    return s;
  }
  __device__ void operator+=(const Series& o) { ZF_UNROLL for (int i = 0; i <= kOrder; ++i) c[i] += o.c[i]; }
  __device__ void operator-=(const Series& o) { ZF_UNROLL for (int i = 0; i <= kOrder; ++i) c[i] -= o.c[i]; }
  __device__ Series times(double x) const {
    Series s;
    ZF_UNROLL for (int i = 0; i <= kOrder; ++i) s.c[i] = x * c[i];
    return s;
  }
  __device__ Series from_right(int step, int width) const {
    Series s;
    ZF_UNROLL for (int i = 0; i <= kOrder; ++i) s.c[i] = cuda::from_right(c[i], step, width);
    return s;
  }
};

// Rows [b, e) of S + t with all but the last eliminated.
template <int kOrder, bool kLogdet>
struct Stretch {
  using series = Series<kOrder>;
  series last, right;   // row e - 1: its pivot so far and its right-hand side
  series link;          // its coupling to row b - 1
  series border, edge;  // what the eliminated rows take from the pivot and the right-hand side of row b - 1
  series gain;          // of the eliminated rows
  double trace, trace2;
  Product determinant;

  // The stretch of one row.
  __device__ void begin(double own, double off, double z, double t) {
    last = series::of(own + t, 1), right = series::of(z), link = series::of(off);
    border = edge = gain = series::of(0);
    trace = trace2 = 0;
    determinant = {1, 0};
  }
  // Eliminates the last row; `e` and `h` are its right-hand side and its link, divided by the pivot.
  // Rule 1: S has no negative eigenvalue, so no pivot, in whatever order of rows, is below t but by rounding.
  __device__ series eliminate(double t, double inverse, series& e, series& h) {
    const double d = last.c[0] < t ? t : last.c[0];
    series q = series::of(1 / d);
    if constexpr (kOrder > 0) {
      const double slope = last.c[1] * q.c[0];
      q.c[1] = -slope * q.c[0];
      trace += slope;
      if constexpr (kOrder > 1) {
        const double turn = last.c[2] * q.c[0];
        q.c[2] = -(slope * q.c[1] + turn * q.c[0]);
        trace2 += slope * slope - 2 * turn;
      }
    }
    if (kLogdet) determinant *= d * inverse;
    e = q * right;
    gain += e * right;
    h = q * link;
    return q;
  }
  // Takes in the next row.
  __device__ void append(double own, double off, double z, double t, double inverse) {
    series e, h;
    const series q = eliminate(t, inverse, e, h);
    border += h * link, edge += e * link;
    last = series::of(own + t, 1), last -= q.times(off * off);
    right = series::of(z), right -= e.times(off);
    link = h.times(-off);
  }
  // Takes in the stretch that begins after this one.
  __device__ void join(const Stretch& o, double t) {
    last -= o.border, right -= o.edge;
    series e, h;
    const series q = eliminate(t, 1 / t, e, h);
    border += h * link, edge += e * link;
    last = o.last, last -= q * o.link * o.link;
    right = o.right, right -= e * o.link;
    link = (h * o.link).times(-1);
    gain += o.gain, trace += o.trace, trace2 += o.trace2;
    if (kLogdet) determinant *= o.determinant;
  }
  __device__ Stretch from_right(int step, int width) const {
    Stretch o{};
    o.last = last.from_right(step, width), o.right = right.from_right(step, width);
    o.link = link.from_right(step, width), o.border = border.from_right(step, width);
    o.edge = edge.from_right(step, width), o.gain = gain.from_right(step, width);
    if (kOrder > 0) o.trace = cuda::from_right(trace, step, width);
    if (kOrder > 1) o.trace2 = cuda::from_right(trace2, step, width);
    if (kLogdet) o.determinant = cuda::from_right(determinant, step, width);
    return o;
  }
};

// First row of a thread's stretch.
__device__ inline int stretch_begin(const EvidenceProblem& p, int lane) { return int((long long)(lane)*p.k >> p.team); }

template <int kOrder, bool kLogdet>
__device__ inline EvidenceSums tridiagonal_sums(const EvidenceProblem& p, const Place& at, double t, bool idle,
                                                double* memory) {
  Stretch<kOrder, kLogdet> s;
  s.begin(1, 0, 0, 1);
  if (!idle && p.k > 0) {
    const int begin = stretch_begin(p, at.lane), end = stretch_begin(p, at.lane + 1);
    const double *own = p.diagonal, *off = p.offdiagonal, *z = at.z, inverse = 1 / t;
    s.begin(own[begin], begin > 0 ? off[begin - 1] : 0, *z, t);
    // A row's numbers are read while the one before it is eliminated.
    double next_own = 0, next_off = 0, next_z = 0;
    if (begin + 1 < end) next_own = own[begin + 1], next_off = off[begin], next_z = z[at.size];
    for (int i = begin + 1; i < end; ++i) {
      const double this_own = next_own, this_off = next_off, this_z = next_z;
      z += at.size;
      if (i + 1 < end) next_own = own[i + 1], next_off = off[i], next_z = z[at.size];
      s.append(this_own, this_off, this_z, t, inverse);
    }
  }
  team_join(s, at, reinterpret_cast<Stretch<kOrder, kLogdet>*>(memory), t);
  EvidenceSums sums;
  if (p.k == 0) return sums;
  Series<kOrder> e, h;
  s.eliminate(t, 1 / t, e, h);
  sums.gain = s.gain.c[0];
  if constexpr (kOrder > 0) sums.gamma = double(p.k) - t * s.trace, sums.energy = -s.gain.c[1];
  if constexpr (kOrder > 1) sums.curve = s.trace - t * s.trace2, sums.bend = s.gain.c[2];
  if (kLogdet) sums.logdet = s.determinant.logarithm();
  return sums;
}

// (S + t)^-1 z of one output, by one thread: asked for once, where a round is run dozens of times.
__device__ inline void tridiagonal_mean(const EvidenceProblem& p, long long output, double t, double* reciprocal) {
  const double* z = p.projected + output;
  double* mean = p.mean + output;
  double q = 0, right = 0;
  for (int i = 0; i < p.k; ++i) {
    const double off = i > 0 ? p.offdiagonal[i - 1] : 0, d = p.diagonal[i] + t - off * off * q;
    right = z[(long long)(i)*p.outputs] - off * q * right;
    q = 1 / (d < t ? t : d);
    reciprocal[i] = q;
    mean[(long long)(i)*p.outputs] = right;
  }
  double m = 0;
  for (int i = p.k - 1; i >= 0; --i) {
    double rest = mean[(long long)(i)*p.outputs];
    if (i + 1 < p.k) rest -= p.offdiagonal[i] * m;
    m = rest * reciprocal[i];
    mean[(long long)(i)*p.outputs] = m;
  }
}

// ------------------------------------------------------------------------------------------------------------- rounds

// Of this thread's output; valid in leaders.  May contain a barrier.
template <bool kTridiagonal, int kOrder, bool kLogdet>
__device__ inline EvidenceSums team_sums(const EvidenceProblem& p, const Place& at, double t, bool idle,
                                         double* memory) {
  if constexpr (kTridiagonal) return tridiagonal_sums<kOrder, kLogdet>(p, at, t, idle, memory);
  return diagonal_sums<kOrder, kLogdet>(p, at, t, idle, memory);
}

// Leaders tell their teams where the next sums are wanted, and whether; true while any of the block are.  A barrier.
__device__ inline bool tell(const Place& at, double t, bool done, double* ratio, bool* idle) {
  __syncwarp();  // teams of a warp or less have read what is told anew
  if (at.lane == 0) ratio[at.index] = t, idle[at.index] = done;
  return __syncthreads_or(at.lane == 0 && !done) != 0;
}

// Each thread copies the rows it will read, so that no barrier is needed.
template <bool kTridiagonal>
__device__ inline Place take_place(const EvidenceProblem& p, int threads) {
  Place at;
  at.size = 1 << p.team;
  at.lane = int(threadIdx.x) & (at.size - 1), at.index = int(threadIdx.x) >> p.team;
  at.output = (long long)(int(blockIdx.x) - p.block) * (threads >> p.team) + at.index;
  at.leader = at.lane == 0 && at.output < p.outputs;
  double* packed = p.scratch + at.output * evidence_rows(p.k, p.team) + at.lane;
  at.z = packed;
  if (at.output >= p.outputs) return at;
  const double* z = p.projected + at.output;
  if (kTridiagonal) {
    for (int i = stretch_begin(p, at.lane); i < stretch_begin(p, at.lane + 1); ++i, packed += at.size)
      *packed = z[(long long)(i)*p.outputs];
  } else {
    for (int i = at.lane; i < p.k; i += at.size, packed += at.size) *packed = z[(long long)(i)*p.outputs];
  }
  return at;
}

}  // namespace

template <bool kTridiagonal>
__global__ void __launch_bounds__(kTridiagonal ? kEvidenceChain : kEvidenceThreads)
    evidence_solve_kernel(const __grid_constant__ EvidenceJob job) {
  constexpr int kThreads = kTridiagonal ? kEvidenceChain : kEvidenceThreads, kWarps = kThreads / 32;
  constexpr int kPart = kTridiagonal ? sizeof(Stretch<2, true>) : sizeof(Terms<2, true>);
  __shared__ double part[kPart / sizeof(double) * kWarps];
  __shared__ double ratio[kThreads], trace;
  __shared__ bool idle[kThreads];
  const EvidenceProblem& p = evidence_problem(job);
  const Place at = take_place<kTridiagonal>(p, kThreads);

  double sum = 0;
  for (int i = threadIdx.x; i < p.k; i += kThreads) sum += not_negative(p.diagonal[i]);
  ratio[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int i = threadIdx.x + 32; i < kThreads; i += 32) sum += ratio[i];
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (threadIdx.x == 0) trace = sum;
  }
  __syncthreads();
  const rule::EvidenceRule r{p.samples,   p.features, double(p.k), trace,   job.tolerance,
                             job.epsilon, job.floor,  job.mode,    job.most};

  EvidenceLane lane;
  lane.done = true;
  if (at.leader) lane = rule::evidence_begin(r, p.square[at.output]);
  bool busy = tell(at, lane.t, lane.done, ratio, idle);
  if (r.mode == rule::kExact && busy) {
    for (int point = 0; point < rule::kScanPoints; ++point) {
      const double t = rule::evidence_scan(r, point);
      const EvidenceSums s = team_sums<kTridiagonal, 0, true>(p, at, t, idle[at.index], part);
      if (!lane.done) rule::evidence_offer(r, lane, point, s);
      __syncthreads();  // `part` is written again
    }
    tell(at, lane.t, lane.done, ratio, idle);
  }
  while (busy) {
    const double t = ratio[at.index];
    const EvidenceSums s = r.mode == rule::kExact ? team_sums<kTridiagonal, 2, false>(p, at, t, idle[at.index], part)
                                                  : team_sums<kTridiagonal, 1, false>(p, at, t, idle[at.index], part);
    if (!lane.done) rule::evidence_step(r, lane, s);
    busy = tell(at, lane.t, lane.done, ratio, idle);
  }
  tell(at, lane.t, !at.leader, ratio, idle);
  const EvidenceSums s = team_sums<kTridiagonal, 0, true>(p, at, ratio[at.index], idle[at.index], part);
  __syncthreads();
  if (at.leader) {
    double one[rule::kEvidenceValues];
    rule::evidence_finish(r, lane, s, one);
    const long long here = p.first + at.output;
    for (int v = 0; v < rule::kEvidenceValues; ++v) job.value[v * job.all + here] = one[v];
    job.status[rule::kSteps * job.all + here] = lane.steps;
    job.status[rule::kConverged * job.all + here] = lane.converged;
    job.status[rule::kCode * job.all + here] = lane.code;
    ratio[at.index] = one[rule::kRatio];
  }
  if (!p.mean) return;
  __syncthreads();
  if (at.output >= p.outputs) return;
  const double t = ratio[at.index];
  const bool finite = t <= 1.7976931348623157e308;
  if (kTridiagonal && finite) {
    // All of the team have read their packed rows, and its scratch is free.
    if (at.lane == 0) tridiagonal_mean(p, at.output, t, p.scratch + at.output * evidence_rows(p.k, p.team));
    return;
  }
  const double* z = at.z;
  for (int i = at.lane; i < p.k; i += at.size, z += at.size)
    p.mean[(long long)(i)*p.outputs + at.output] = finite ? *z / (not_negative(p.diagonal[i]) + t) : 0;
}

cudaError_t evidence(const EvidenceJob& job, cudaStream_t stream) {
  if (job.blocks == 0) return cudaSuccess;
  if (job.tridiagonal)
    ZF_LAUNCH((evidence_solve_kernel<true>), unsigned(job.blocks), kEvidenceChain, 0, stream, job);
  else
    ZF_LAUNCH((evidence_solve_kernel<false>), unsigned(job.blocks), kEvidenceThreads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
