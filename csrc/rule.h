// SPDX-License-Identifier: Apache-2.0
// One-step formulas, written once and used by C++ and CUDA alike: the two differ only in who runs them.
#pragma once
#include <cmath>

#include "dtype.h"

namespace zipfast::rule {

// --- correlate
// ------------------------------------------------------------------------------------------------------ Correlations
// from sums over samples of x - shift (Stoica et al. 2024, section 4.1).  `share` is 1 / samples; nothing may be
// contracted, so that all backends have the same bits.
constexpr double kRelativeFloor = 3.814697265625e-06;  // 2^-18: a deviation below this part of the mean is rounding
constexpr double kAbsoluteFloor = 1e-30;
constexpr int64_t kAllFinite = INT64_MAX;
// What is noted per space; the columns of `status`.
enum CorrelateStatus { kFeatureAt, kAliveCount, kPairAt, kCorrelateFields };

struct Spread {
  double mean;     // of x - shift
  double value;    // mean of x
  double inverse;  // 1 / standard deviation; 0: not alive
  bool finite;     // the variance
};

ZF_HD inline bool is_finite(double x) { return x - x == 0; }

// From sums of squares and of values.
ZF_HD inline Spread spread(double square, double total, double shift, double share) {
  Spread s;
  s.mean = total * share, s.value = shift + s.mean;
  const double variance = square * share - s.mean * s.mean;
  const double a = fabs(s.value), b = fabs(shift), limit = kRelativeFloor * (a < b ? b : a);
  s.finite = is_finite(variance);
  s.inverse = s.finite && variance > limit * limit + kAbsoluteFloor ? 1 / sqrt(variance) : 0;
  return s;
}

// Not yet clamped: tells by being infinite or NaN what overflowed.
ZF_HD inline double raw_correlation(double comoment, double share, double mean_i, double mean_j, double inverse_i,
                                    double inverse_j) {
  return (comoment * share - mean_i * mean_j) * inverse_i * inverse_j;
}

// What is not finite becomes NaN; never -0.  Without branches: loops over this are vectors.
ZF_HD inline double correlation(double raw) {
  const double above = raw < -1 ? -1 : raw;
  return (above > 1 ? 1 : above) + (raw - raw);
}

// Of two features that are not alive: the same constant?
ZF_HD inline bool same_constant(double a, double b) {
  const double x = fabs(a), y = fabs(b);
  return fabs(a - b) <= kRelativeFloor * (x < y ? y : x);
}

// Which of the entries of a launch a block works for: the last whose first block, the field kFirst, is at or before it.
template <auto kFirst, class Entry>
ZF_HD inline int entry_of(const Entry* entry, int count, int64_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entry[middle].*kFirst <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Tiles of the upper triangle of a matrix `side` tiles wide, in an order that needs no root: a row and the one as far
// from the other end have side + 1 tiles together.
ZF_HD inline int64_t triangle_tiles(int64_t side) { return side * (side + 1) / 2; }
ZF_HD inline void triangle_tile(int side, int tile, int* row, int* column) {
  const int fold = tile / (side + 1), at = tile - fold * (side + 1), first = side - fold;
  *row = at < first ? fold : first - 1;
  *column = *row + (at < first ? at : at - first);
}

// --- zip_match
// -------------------------------------------------------------------------------------------------------- The models
// of a group are the low 31 bits of an int; the top bit says that the slot left the pool (its group was merged into
// another one, or alpha = 0 retired it).
constexpr int32_t kGone = INT32_MIN;

// Bits that forbid a partner to a slot: its own exhausted models, and having left the pool.
ZF_HD inline int32_t forbids(int32_t models, int32_t exhausted) { return (models & exhausted) | kGone; }

// Similarity of the merged group to a third one (Stoica et al. 2024, section 4.3).
template <class scalar_t>
ZF_HD inline scalar_t merged_similarity(scalar_t alpha, scalar_t a, scalar_t b) {
  return alpha * (b < a ? b : a);
}

// What the matcher reports per space; the columns of `status`.
enum Status { kLifted, kDeadlock, kNanAt, kAsymmetricAt, kStatusFields };

// --- masked_step_
// ------------------------------------------------------------------------------------------------------ One step of
// SGD, Adam and AdamW for one weight, operation after operation as torch.optim takes it tensor by tensor on a CPU: its
// additions of a multiple are fused multiply-adds, and so they are here, by name; nothing else may be contracted.
enum StepKind : int32_t { kStepPlain, kStepMomentum, kStepAdam };  // SGD without and with momentum; Adam, AdamW
// Weight decay is part of the gradient; SGD: no buffer yet, Nesterov; Adam: the old mean is nearer than the gradient.
enum StepFlag : int32_t { kStepCoupled = 1, kStepStart = 2, kStepNesterov = 4, kStepNear = 8 };

ZF_HD inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
ZF_HD inline double fused(double a, double b, double c) { return fma(a, b, c); }
ZF_HD inline float root(float x) { return sqrtf(x); }
ZF_HD inline double root(double x) { return sqrt(x); }

template <class acc_t>
struct StepRule {
  acc_t sign;   // of the gradient
  acc_t rate;   // what multiplies the direction: -lr, for Adam divided by its first bias correction
  acc_t decay;  // what multiplies the weight before it is added to the gradient
  acc_t keep;   // AdamW: what multiplies the weight, else 1
  acc_t momentum, fresh;
  acc_t lerp, beta2, square, correction, eps;  // lerp: 1 - beta1; square: 1 - beta2; correction: root of the second
};

// What the caller passes, in double, as Python has it.
struct StepOptions {
  bool adam, decoupled, nesterov, maximize;
  int64_t step;
  double lr, weight_decay, momentum, dampening, beta1, beta2, eps;
};

inline StepKind step_kind(const StepOptions& o) {
  return o.adam ? kStepAdam : o.momentum != 0 ? kStepMomentum : kStepPlain;
}

inline int step_flags(const StepOptions& o) {
  const bool coupled = o.weight_decay != 0 && !o.decoupled, momentum = step_kind(o) == kStepMomentum;
  return (coupled ? kStepCoupled : 0) | (momentum && o.step == 1 ? kStepStart : 0) |
         (momentum && o.nesterov ? kStepNesterov : 0) | (o.adam && float(1 - o.beta1) < 0.5f ? kStepNear : 0);
}

template <class acc_t>
inline StepRule<acc_t> step_rule(const StepOptions& o) {
  const double step = double(o.step), bias = o.adam ? 1 - pow(o.beta1, step) : 1;
  StepRule<acc_t> r;
  r.sign = acc_t(o.maximize ? -1 : 1);
  r.rate = acc_t(-(o.lr / bias));
  r.decay = acc_t(o.weight_decay);
  r.keep = acc_t(o.decoupled ? 1 - o.lr * o.weight_decay : 1);
  r.momentum = acc_t(o.momentum), r.fresh = acc_t(1 - o.dampening);
  r.lerp = acc_t(1 - o.beta1), r.beta2 = acc_t(o.beta2), r.square = acc_t(1 - o.beta2);
  r.correction = acc_t(pow(1 - pow(o.beta2, step), 0.5)), r.eps = acc_t(o.eps);
  return r;
}

// Weight w, gradient g, state m and v.  Where `flags` are constants, no branch is left and loops over this are vectors.
template <StepKind kKind, class acc_t>
ZF_HD inline void step_weight(const StepRule<acc_t>& r, int flags, acc_t& w, acc_t g, acc_t& m, acc_t& v) {
  g *= r.sign;
  if (flags & kStepCoupled) g = fused(w, r.decay, g);
  if constexpr (kKind == kStepAdam) {
    // From the nearer end, as torch interpolates.
    m = flags & kStepNear ? fused(r.lerp, g - m, m) : fused(r.lerp - acc_t(1), g - m, g);
    v = fused(r.square * g, g, v * r.beta2);
    w = w * r.keep + (r.rate * m) / (root(v) / r.correction + r.eps);
  } else {
    if constexpr (kKind == kStepMomentum) {
      m = flags & kStepStart ? g : fused(g, r.fresh, m * r.momentum);
      g = flags & kStepNesterov ? fused(m, r.momentum, g) : m;
    }
    w = fused(g, r.rate, w);
  }
}

// --- evidence
// ------------------------------------------------------------------------------------------------------- The evidence
// of Bayesian linear regression of one output y on N x D features F, with G = F^T F = V diag(s) V^T and z = V^T F^T y
// (You et al. 2021, section 4).  Everything is a function of t = alpha / beta through six sums over the k kept
// eigenvalues, so the sums belong to whoever has the data, and what follows from them is here.
enum EvidenceMode : int32_t { kReference, kCorrected, kExact };
enum EvidenceCode : int32_t { kFine, kEmpty, kNoSignal, kPerfectFit, kNotFinite };
enum EvidenceValue { kEvidence, kAlpha, kBeta, kRatio, kEvidenceValues };
enum EvidenceStatus { kSteps, kConverged, kCode, kEvidenceStatus };

struct EvidenceSums {
  double gamma = 0;   // sum s / (s + t)
  double curve = 0;   // sum s / (s + t)^2
  double gain = 0;    // sum z^2 / (s + t)
  double energy = 0;  // sum z^2 / (s + t)^2 = |m|^2
  double bend = 0;    // sum z^2 / (s + t)^3
  double logdet = 0;  // sum log(1 + s / t), where asked for
};

struct EvidenceRule {
  double samples, features, kept;    // N, D, k
  double trace;                      // sum s, the scale of t
  double tolerance, epsilon, floor;  // see zipfast/ops/evidence.py
  int32_t mode, most;                // most: rounds
};

// Exact mode looks at kScanPoints values of log t before it climbs, as the profile may have several maxima.  Two peaks
// of nearly one height can be told apart at steps of 1.25: of 4000 spectra made to have two, none was taken for the
// other.
constexpr int kScanPoints = 35;
constexpr double kScanFirst = -36, kScanStep = 1.25, kClimbLow = -60, kClimbHigh = 26, kFlat = 18, kLongestStep = 3;

struct EvidenceLane {
  double square = 0;         // |y|^2
  double t = 1, u = 0;       // where the next sums are wanted; u = log t
  double low = 0, high = 0;  // the maximum lies between these u
  double best = 0;           // highest profile of the scan
  double alpha = 1, beta = 1, energy = 0, residual = 0, used = 1;
  int32_t at = -1, steps = 0, code = kFine;
  bool done = false, converged = false;
};

ZF_HD inline EvidenceLane evidence_begin(const EvidenceRule& r, double square) {
  EvidenceLane lane;
  lane.square = square;
  if (r.mode == kReference) return lane;
  if (!(square > 0 && square <= 1.7976931348623157e308)) {
    lane.code = square == 0 ? kEmpty : kNotFinite;
    lane.done = true;
  } else if (r.mode == kExact && !(r.trace > 0)) {
    lane.code = r.trace == 0 ? kNoSignal : kNotFinite;
    lane.done = true;
  }
  return lane;
}

ZF_HD inline double evidence_scan(const EvidenceRule& r, int point) {
  return exp(log(r.trace) + kScanFirst + kScanStep * point);
}

// |y - F m|^2 + t |m|^2, not below what rounding leaves of it.
ZF_HD inline double evidence_misfit(const EvidenceRule& r, const EvidenceLane& lane, const EvidenceSums& s) {
  const double q = lane.square - s.gain, least = r.floor * lane.square;
  return q < least ? least : q;
}

// N times the evidence at the best beta for this t, without its constant.
ZF_HD inline double evidence_profile(const EvidenceRule& r, const EvidenceLane& lane, const EvidenceSums& s) {
  return -0.5 * r.samples * log(evidence_misfit(r, lane, s) / r.samples) - 0.5 * s.logdet;
}

// Rule 1: after the scan, low < u < high brackets the highest point seen.
ZF_HD inline void evidence_offer(const EvidenceRule& r, EvidenceLane& lane, int point, const EvidenceSums& s) {
  const double value = evidence_profile(r, lane, s);
  if (lane.at < 0 || value > lane.best) lane.at = point, lane.best = value;
  if (point + 1 < kScanPoints) return;
  const double origin = log(r.trace), step = kScanStep;
  lane.u = origin + kScanFirst + step * lane.at;
  lane.low = lane.at == 0 ? origin + kClimbLow : lane.u - step;
  lane.high = lane.at + 1 == kScanPoints ? origin + kClimbHigh : lane.u + step;
  lane.t = exp(lane.u);
}

// One round of the fixed point (MacKay 1992): the new alpha and beta meet the sums of the old t, as in the public code.
ZF_HD inline void evidence_fixed_point(const EvidenceRule& r, EvidenceLane& lane, const EvidenceSums& s) {
  const bool guard = r.mode == kCorrected;
  lane.used = lane.t;
  lane.energy = s.energy;
  lane.residual = lane.square - s.gain - lane.t * s.energy;
  double free = r.samples - s.gamma;
  if (guard && lane.residual < 0) lane.residual = 0;
  if (guard && free < 0) free = 0;
  lane.alpha = s.gamma / (lane.energy + r.epsilon);
  lane.beta = free / (lane.residual + r.epsilon);
  double next = lane.alpha / lane.beta;
  lane.converged = fabs(next - lane.t) / lane.t <= r.tolerance;
  if (guard && next < 1e-300) next = 1e-300;  // NaN stays
  lane.t = next;
}

// One safeguarded Newton step on log t.  Rule 2: the bracket only shrinks.
ZF_HD inline void evidence_newton(const EvidenceRule& r, EvidenceLane& lane, const EvidenceSums& s) {
  const double n = r.samples, t = lane.t, q = evidence_misfit(r, lane, s);
  double slope = 0.5 * s.gamma, bend = -0.5 * t * s.curve;
  if (lane.square - s.gain > r.floor * lane.square) {
    const double pull = t * s.energy / q;
    slope -= 0.5 * n * pull;
    bend -= 0.5 * n * ((t * s.energy - 2 * t * t * s.bend) / q - pull * pull);
  }
  if (slope > 0) lane.low = lane.u;
  if (slope < 0) lane.high = lane.u;
  double move = bend < 0 ? -slope / bend : slope > 0 ? 1. : -1.;
  if (move > kLongestStep) move = kLongestStep;
  if (move < -kLongestStep) move = -kLongestStep;
  double next = lane.u + move;
  if (!(next > lane.low && next < lane.high)) next = 0.5 * (lane.low + lane.high);
  // So far out the profile is flat: no signal.
  const bool flat = slope >= 0 && lane.u > log(r.trace) + kFlat;
  lane.converged = fabs(next - lane.u) < r.tolerance || flat;
  lane.u = next;
  lane.t = slope == slope ? exp(next) : NAN;
}

ZF_HD inline void evidence_step(const EvidenceRule& r, EvidenceLane& lane, const EvidenceSums& s) {
  if (lane.done) return;
  ++lane.steps;
  if (r.mode == kExact)
    evidence_newton(r, lane, s);
  else
    evidence_fixed_point(r, lane, s);
  lane.done = lane.converged || lane.steps >= r.most || !(lane.t == lane.t);
}

// `value`: what kEvidence ... kRatio name; s: the sums at lane.t, with logdet.  The ratio is the t of the posterior
// mean.
ZF_HD inline void evidence_finish(const EvidenceRule& r, EvidenceLane& lane, const EvidenceSums& s, double* value) {
  const double n = r.samples, log_tau = 1.8378770664093454835606594728112;  // log 2 pi
  const double nothing = -0.5 * (log(lane.square / n) + 1 + log_tau);
  double evidence, alpha = lane.alpha, beta = lane.beta, ratio = lane.used;
  if (lane.code == kEmpty || lane.code == kNotFinite) {
    evidence = alpha = beta = ratio = NAN;
  } else if (r.mode == kExact) {
    const double q = evidence_misfit(r, lane, s);
    ratio = lane.t;
    beta = n / q;
    alpha = ratio * beta;
    evidence = (evidence_profile(r, lane, s) - 0.5 * n * (1 + log_tau)) / n;
    if (lane.code == kNoSignal || evidence <= nothing + 1e-13) {
      lane.code = kNoSignal;
      lane.converged = true;
      evidence = nothing;
      alpha = ratio = INFINITY;
      beta = n / lane.square;
    } else if (lane.square - s.gain <= r.floor * lane.square * (1 + 1e-3)) {
      lane.code = kPerfectFit;
    }
  } else {
    evidence = 0.5 * n * log(beta) - 0.5 * s.logdet - 0.5 * beta * lane.residual - 0.5 * alpha * lane.energy;
    if (r.mode == kReference) evidence += 0.5 * (r.features - r.kept) * log(alpha);
    evidence = evidence / n - 0.5 * log_tau;
  }
  if (lane.code == kFine && !(fabs(evidence) <= 1.7976931348623157e308)) lane.code = kNotFinite;
  value[kEvidence] = evidence, value[kAlpha] = alpha, value[kBeta] = beta, value[kRatio] = ratio;
}

// --- threshold
// ----------------------------------------------------------------------------------------------------- Magnitudes are
// ranked by their bits without the sign, an order of integers; every NaN is one value, the next after infinity.
template <class scalar_t>
struct Magnitude;
template <>
struct Magnitude<float> {
  using key_t = int32_t;
  static constexpr int32_t kSign = 0x7fffffff, kNan = 0x7f800001;
  static constexpr int kBits = 31;
};
template <>
struct Magnitude<double> {
  using key_t = int64_t;
  static constexpr int64_t kSign = 0x7fffffffffffffff, kNan = 0x7ff0000000000001;
  static constexpr int kBits = 63;
};
template <>
struct Magnitude<Half> {
  using key_t = int16_t;
  static constexpr int16_t kSign = 0x7fff, kNan = 0x7c01;
  static constexpr int kBits = 15;
};
template <>
struct Magnitude<BFloat16> {
  using key_t = int16_t;
  static constexpr int16_t kSign = 0x7fff, kNan = 0x7f81;
  static constexpr int kBits = 15;
};

// Keys are counted digit by digit, from the highest: the lowest bit of the digit of a pass, and how many there are.
constexpr int kThresholdDigit = 11, kThresholdBins = 1 << kThresholdDigit;
ZF_HD inline int threshold_shift(int bits, int pass) {
  const int shift = bits - kThresholdDigit * (pass + 1);
  return shift > 0 ? shift : 0;
}
ZF_HD inline int threshold_passes(int bits) { return (bits + kThresholdDigit - 1) / kThresholdDigit; }

// The key of a stored value, from its bits.
template <class scalar_t>
ZF_HD inline typename Magnitude<scalar_t>::key_t magnitude_key(typename Magnitude<scalar_t>::key_t bits) {
  using M = Magnitude<scalar_t>;
  using key_t = typename M::key_t;
  const key_t key = key_t(bits & M::kSign);
  return key < M::kNan ? key : M::kNan;
}

}  // namespace zipfast::rule
