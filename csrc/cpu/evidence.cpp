// SPDX-License-Identifier: Apache-2.0
// evidence on the CPU: the six sums over k of rule::EvidenceSums for eight outputs at a time, one vector lane each
// (You et al. 2021, section 4; the steps themselves are in rule.h).
//
// Work is cut into blocks of kLanes outputs of one problem, each owned by one thread; every lane adds its k terms in
// order, so results depend neither on threads nor on the neighbours in its block.  A block's z is packed once, [k,
// kLanes], and stays in cache over the rounds.  A round costs k divisions per lane (tridiagonal: 3 k), a block k * 64
// bytes of memory (tridiagonal: three times that).
#include <cassert>
#include <cstring>
#include <memory>

#include "cpu/simd.h"
#include "rule.h"
#include "stable.h"

namespace zipfast {
namespace {

constexpr int kLanes = 8;
typedef double vec __attribute__((vector_size(kLanes * sizeof(double))));
typedef int64_t word __attribute__((vector_size(kLanes * sizeof(int64_t))));

struct Problem {
  rule::EvidenceRule rule;
  const double* diagonal;     // [k]
  const double* offdiagonal;  // [k - 1] or null
  const double* projected;    // [k, outputs]
  const double* square;       // [outputs]
  double* mean;               // [k, outputs] or null
  int64_t k, outputs, first;  // first: of its outputs among all
};

// A product as mantissa in [1, 2) and exponent: the logarithm of k factors costs one logarithm.
struct Product {
  vec mantissa = vec{} + 1;
  word exponent = {};

  // Rule 1: mantissa in [1, 2) before and after; factor in [1, 2^1022).
  ZF_INLINE void operator*=(vec factor) {
    word bits;
    mantissa *= factor;
    memcpy(&bits, &mantissa, sizeof bits);
    exponent += (bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffLL) | 0x3ff0000000000000LL;
    memcpy(&mantissa, &bits, sizeof bits);
  }
};

struct Sums {
  vec gamma = {}, curve = {}, gain = {}, energy = {}, bend = {};
  Product determinant;
};

template <bool kLogdet>
ZF_INLINE void diagonal_sums(const Problem& p, const vec* z, vec t, Sums& s) {
  const vec inverse = 1 / t;
  for (int64_t i = 0; i < p.k; ++i) {
    const double own = p.diagonal[i] > 0 ? p.diagonal[i] : p.diagonal[i] <= 0 ? 0 : p.diagonal[i];
    const vec q = 1 / (own + t), shrunk = own * q, y = z[i] * q, y2 = y * y;
    s.gamma += shrunk;
    s.curve += shrunk * q;
    s.gain += z[i] * y;
    s.energy += y2;
    s.bend += y2 * q;
    if (kLogdet) s.determinant *= 1 + own * inverse;
  }
}

ZF_INLINE vec at_least(vec x, vec least) { return x < least ? least : x; }

// S + t = L P L^T with pivots P; the derivatives of the pivots by t give the traces of the inverse and of its square.
// Rule 2: S has no negative eigenvalue, so no pivot is below t but by rounding.
template <bool kLogdet>
ZF_INLINE void tridiagonal_sums(const Problem& p, const vec* z, vec t, vec* pivot, vec* work, Sums& s) {
  const vec inverse = 1 / t;
  vec slope = {}, turn = {}, trace = {}, trace2 = {};
  for (int64_t i = 0; i < p.k; ++i) {
    vec d = p.diagonal[i] + t, right = z[i], first = vec{} + 1, second = {};
    if (i > 0) {
      const double off = p.offdiagonal[i - 1];
      const vec factor = off / pivot[i - 1], ratio = factor * factor;
      d -= factor * off;
      right -= factor * work[i - 1];
      first += ratio * slope;
      second = ratio * (turn - 2 * slope * slope / pivot[i - 1]);
    }
    pivot[i] = d = at_least(d, t);
    work[i] = right;
    slope = first, turn = second;
    const vec q = 1 / d, log_slope = slope * q;
    trace += log_slope;
    trace2 += log_slope * log_slope - turn * q;
    s.gain += right * right * q;
    if (kLogdet) s.determinant *= d * inverse;
  }
  // Backward: m = (S + t)^-1 z, in place of the right-hand side.
  for (int64_t i = p.k - 1; i >= 0; --i) {
    vec m = work[i];
    if (i + 1 < p.k) m -= p.offdiagonal[i] * work[i + 1];
    work[i] = m = m / pivot[i];
    s.energy += m * m;
  }
  // Forward again: m^T (S + t)^-1 m.
  vec before = {};
  for (int64_t i = 0; i < p.k; ++i) {
    vec right = work[i];
    if (i > 0) right -= p.offdiagonal[i - 1] / pivot[i - 1] * before;
    s.bend += right * right / pivot[i];
    before = right;
  }
  s.gamma = double(p.k) - t * trace;
  s.curve = trace - t * trace2;
}

struct Scratch {
  vec *z, *pivot, *work;  // [k] each; the last two for the tridiagonal form only
};

template <bool kLogdet>
ZF_INLINE void sums(const Problem& p, const Scratch& scratch, const vec& t, rule::EvidenceSums* out) {
  Sums s;
  if (p.offdiagonal)
    tridiagonal_sums<kLogdet>(p, scratch.z, t, scratch.pivot, scratch.work, s);
  else
    diagonal_sums<kLogdet>(p, scratch.z, t, s);
  for (int l = 0; l < kLanes; ++l) {
    out[l] = {s.gamma[l], s.curve[l], s.gain[l], s.energy[l], s.bend[l], 0};
    if (kLogdet) out[l].logdet = std::log(s.determinant.mantissa[l]) + 0.6931471805599453 * s.determinant.exponent[l];
  }
}

// One block: outputs [begin, begin + lanes) of a problem; value [kEvidenceValues, all], status [kEvidenceStatus, all].
ZF_INLINE void solve_block(const Problem& p, int64_t begin, int lanes, const Scratch& scratch, double* value,
                           int64_t* status, int64_t all) {
  for (int64_t i = 0; i < p.k; ++i) {
    vec packed = {};
    for (int l = 0; l < lanes; ++l) packed[l] = p.projected[i * p.outputs + begin + l];
    scratch.z[i] = packed;
  }
  rule::EvidenceLane lane[kLanes];
  rule::EvidenceSums found[kLanes];
  bool busy = false;
  for (int l = 0; l < kLanes; ++l) {
    if (l < lanes)
      lane[l] = rule::evidence_begin(p.rule, p.square[begin + l]);
    else
      lane[l].done = true;
    busy |= !lane[l].done;
  }
  vec t = vec{} + 1;
  if (p.rule.mode == rule::kExact && busy) {
    for (int point = 0; point < rule::kScanPoints; ++point) {
      t = vec{} + rule::evidence_scan(p.rule, point);
      sums<true>(p, scratch, t, found);
      for (int l = 0; l < lanes; ++l)
        if (!lane[l].done) rule::evidence_offer(p.rule, lane[l], point, found[l]);
    }
  }
  while (busy) {
    for (int l = 0; l < kLanes; ++l) t[l] = lane[l].t;
    sums<false>(p, scratch, t, found);
    busy = false;
    for (int l = 0; l < lanes; ++l) {
      rule::evidence_step(p.rule, lane[l], found[l]);
      busy |= !lane[l].done;
    }
  }
  for (int l = 0; l < kLanes; ++l) t[l] = lane[l].t;
  sums<true>(p, scratch, t, found);
  double one[rule::kEvidenceValues];
  vec ratio = vec{} + 1;
  for (int l = 0; l < lanes; ++l) {
    const int64_t at = p.first + begin + l;
    rule::evidence_finish(p.rule, lane[l], found[l], one);
    for (int v = 0; v < rule::kEvidenceValues; ++v) value[v * all + at] = one[v];
    status[rule::kSteps * all + at] = lane[l].steps;
    status[rule::kConverged * all + at] = lane[l].converged;
    status[rule::kCode * all + at] = lane[l].code;
    ratio[l] = one[rule::kRatio];
  }
  if (!p.mean) return;
  if (p.offdiagonal) sums<false>(p, scratch, ratio, found);  // leaves (S + t)^-1 z in `work`
  for (int64_t i = 0; i < p.k; ++i) {
    const double own = p.diagonal[i] > 0 ? p.diagonal[i] : 0;
    const vec m = p.offdiagonal ? scratch.work[i] : scratch.z[i] / (own + ratio);
    for (int l = 0; l < lanes; ++l) p.mean[i * p.outputs + begin + l] = ratio[l] <= 1.7976931348623157e308 ? m[l] : 0;
  }
}

ZF_MULTIVERSION void run_block(const Problem& p, int64_t begin, int lanes, const Scratch& scratch, double* value,
                               int64_t* status, int64_t all) {
  solve_block(p, begin, lanes, scratch, value, status, all);
}

struct Aligned {
  void operator()(vec* p) const { ::operator delete[](p, std::align_val_t(sizeof(vec))); }
};

std::tuple<Tensor, Tensor, Tensor> evidence_cpu(const std::vector<Tensor>& diagonal,
                                                const std::vector<Tensor>& offdiagonal,
                                                const std::vector<Tensor>& projected, const std::vector<Tensor>& square,
                                                const std::vector<int64_t>& samples,
                                                const std::vector<int64_t>& features, int64_t mode, double tol,
                                                int64_t max_iter, double eps, double floor, bool mean) {
  const size_t problems = diagonal.size();
  STD_TORCH_CHECK(problems > 0 && projected.size() == problems && square.size() == problems &&
                      samples.size() == problems && features.size() == problems &&
                      (offdiagonal.empty() || offdiagonal.size() == problems),
                  "evidence: malformed lists");
  int64_t all = 0, entries = 0;
  for (size_t i = 0; i < problems; ++i) {
    const int64_t k = diagonal[i].size(0), outputs = square[i].size(0);
    STD_TORCH_CHECK(projected[i].dim() == 2 && projected[i].size(0) == k && projected[i].size(1) == outputs &&
                        (offdiagonal.empty() || offdiagonal[i].size(0) == std::max<int64_t>(k - 1, 0)),
                    "evidence: malformed problem");
    all += outputs, entries += k * outputs;
  }
  using torch::stable::new_empty;
  Tensor value = new_empty(diagonal[0], {int64_t(rule::kEvidenceValues), all}, ScalarType::Double);
  Tensor status = new_empty(diagonal[0], {int64_t(rule::kEvidenceStatus), all}, ScalarType::Long);
  Tensor means = new_empty(diagonal[0], {mean ? entries : 0}, ScalarType::Double);
  double *pv = value.mutable_data_ptr<double>(), *pm = means.mutable_data_ptr<double>();
  int64_t* ps = status.mutable_data_ptr<int64_t>();

  std::vector<Tensor> keep;
  auto data = [&](const Tensor& t) {
    keep.push_back(as_contiguous(t));
    return keep.back().const_data_ptr<double>();
  };
  std::vector<Problem> problem;
  std::vector<std::pair<int64_t, int64_t>> block;  // problem, first output
  int64_t first = 0, entry = 0, longest = 0;
  for (size_t i = 0; i < problems; ++i) {
    const int64_t k = diagonal[i].size(0), outputs = square[i].size(0);
    Problem p{{double(samples[i]), double(features[i]), double(k), 0, tol, eps, floor, int32_t(mode),
               int32_t(std::min<int64_t>(max_iter, INT32_MAX))},
              data(diagonal[i]),
              offdiagonal.empty() ? nullptr : data(offdiagonal[i]),
              data(projected[i]),
              data(square[i]),
              mean ? pm + entry : nullptr,
              k,
              outputs,
              first};
    for (int64_t j = 0; j < k; ++j) p.rule.trace += p.diagonal[j] <= 0 ? 0 : p.diagonal[j];
    for (int64_t b = 0; b < outputs; b += kLanes) block.emplace_back(int64_t(i), b);
    problem.push_back(p);
    first += outputs, entry += k * outputs, longest = std::max(longest, k);
  }
  const int64_t rows = std::max<int64_t>(longest, 1);
  torch::stable::parallel_for(0, int64_t(block.size()), 1, [&](int64_t b, int64_t e) {
    const std::unique_ptr<vec, Aligned> memory(
        static_cast<vec*>(::operator new[](sizeof(vec) * size_t(3 * rows), std::align_val_t(sizeof(vec)))));
    const Scratch scratch{memory.get(), memory.get() + rows, memory.get() + 2 * rows};
    for (int64_t i = b; i < e; ++i) {
      const Problem& p = problem[size_t(block[size_t(i)].first)];
      const int64_t begin = block[size_t(i)].second;
      run_block(p, begin, int(std::min<int64_t>(kLanes, p.outputs - begin)), scratch, pv, ps, all);
    }
  });
  return {value, status, means};
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("evidence", TORCH_BOX(&zipfast::evidence_cpu)); }
