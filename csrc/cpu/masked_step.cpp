// SPDX-License-Identifier: Apache-2.0
// masked_step_ on the CPU: a step of SGD, Adam or AdamW and the mask of weights and state, many tensors in one call
// (Frankle & Carbin 2019, section 2).
//
// Work is cut into pieces of kPiece elements of one tensor, each owned by one thread.  Inside, 32 weights at a time (a
// word of the mask) are stepped as vectors by the formula of rule.h, and what is dead is replaced by zero.  A word
// without survivors takes the same way: to leave it out, and to see that its zeros are there, was measured to be no
// faster down to 0.5 % of survivors.  16-bit tensors go through buffers of kBlock float32 values in the first cache.
// One pass: weights, state and gradient are read once.  The bits depend on nothing but the arguments.
#include <algorithm>
#include <bit>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/mask.h"
#include "rule.h"

namespace zipfast {
namespace {

constexpr int64_t kPiece = 65536, kBlock = 512;

struct StepTensor {
  void* param;
  void* first;   // null: none
  void* second;  // null: none
  const void* grad;
  const uint8_t* mask;
  int64_t size;
  DType dtype, state;
};
struct StepJob {
  rule::StepRule<float> single;
  rule::StepRule<double> wide;
  rule::StepKind kind;
  int flags;
};

template <class acc_t>
using Bits = std::conditional_t<sizeof(acc_t) == 8, uint64_t, uint32_t>;

// x or +0, without a branch that could take the arithmetic along with it.
template <class acc_t>
ZF_INLINE acc_t if_alive(acc_t x, Bits<acc_t> alive) {
  return std::bit_cast<acc_t>(std::bit_cast<Bits<acc_t>>(x) & (Bits<acc_t>(0) - alive));
}

// Elements `begin` (a multiple of 32) and following; the pointers are at `begin` already.
template <class acc_t>
struct Run {
  acc_t* w;
  const acc_t* g;
  acc_t *m, *v;  // null: none
  const uint8_t* mask;
  int64_t begin, size;
};

template <rule::StepKind kKind, int kFlags, class acc_t>
ZF_INLINE void step_word(const rule::StepRule<acc_t>& r, const Run<acc_t>& x, int64_t at, int64_t n) {
  const uint32_t word = mask_word(x.mask, x.begin + at);
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) {
    acc_t weight = x.w[at + e], one = 0, two = 0;
    if constexpr (kKind != rule::kStepPlain) one = x.m[at + e];
    if constexpr (kKind == rule::kStepAdam) two = x.v[at + e];
    rule::step_weight<kKind>(r, kFlags, weight, x.g[at + e], one, two);
    const Bits<acc_t> alive = (word >> e) & 1;
    x.w[at + e] = if_alive(weight, alive);
    if constexpr (kKind != rule::kStepPlain) x.m[at + e] = if_alive(one, alive);
    if constexpr (kKind == rule::kStepAdam) x.v[at + e] = if_alive(two, alive);
  }
}

template <rule::StepKind kKind, int kFlags, class acc_t>
ZF_INLINE void step_run(const rule::StepRule<acc_t>& rule, const Run<acc_t>& run) {
  const rule::StepRule<acc_t> r = rule;  // copies: no store may change them
  const Run<acc_t> x = run;
  int64_t at = 0;
  for (; at + kMaskWord <= x.size; at += kMaskWord) step_word<kKind, kFlags>(r, x, at, kMaskWord);
  if (at < x.size) step_word<kKind, kFlags>(r, x, at, x.size - at);
}

template <rule::StepKind kKind, class acc_t, int... kFlags>
ZF_INLINE void step_any(const rule::StepRule<acc_t>& r, int flags, const Run<acc_t>& run,
                        std::integer_sequence<int, kFlags...>) {
  ((flags == kFlags ? step_run<kKind, kFlags>(r, run) : void()), ...);
}

// Every set of options is a loop of its own.
template <class acc_t>
ZF_INLINE void step_all(const rule::StepRule<acc_t>& r, rule::StepKind kind, int flags, const Run<acc_t>& run) {
  constexpr int kC = rule::kStepCoupled, kS = rule::kStepStart, kN = rule::kStepNesterov, kM = rule::kStepNear;
  using Plain = std::integer_sequence<int, 0, kC>;
  using Momentum = std::integer_sequence<int, 0, kC, kS, kC | kS, kN, kC | kN, kS | kN, kC | kS | kN>;
  using Adam = std::integer_sequence<int, 0, kC, kM, kC | kM>;
  if (kind == rule::kStepAdam)
    step_any<rule::kStepAdam>(r, flags, run, Adam{});
  else if (kind == rule::kStepMomentum)
    step_any<rule::kStepMomentum>(r, flags, run, Momentum{});
  else
    step_any<rule::kStepPlain>(r, flags, run, Plain{});
}

ZF_MULTIVERSION void run_single(const rule::StepRule<float>& r, rule::StepKind kind, int flags, const Run<float>& x) {
  step_all(r, kind, flags, x);
}
ZF_MULTIVERSION void run_double(const rule::StepRule<double>& r, rule::StepKind kind, int flags, const Run<double>& x) {
  step_all(r, kind, flags, x);
}

template <class scalar_t>
ZF_INLINE void widen_block(const void* x, int64_t at, int64_t n, float* out) {
  const scalar_t* from = static_cast<const scalar_t*>(x) + at;
  for (int64_t e = 0; e < n; ++e) out[e] = widen(from[e]);
}
template <class scalar_t>
ZF_INLINE void narrow_block(const float* x, int64_t at, int64_t n, void* out) {
  scalar_t* to = static_cast<scalar_t*>(out) + at;
  for (int64_t e = 0; e < n; ++e) to[e] = narrow<scalar_t>(double(x[e]));
}

// Elements `at` and following as float32: where they lie, or widened into the buffer.
ZF_MULTIVERSION float* take(void* x, DType dtype, int64_t at, int64_t n, float* buffer) {
  if (x == nullptr) return nullptr;
  if (dtype == DType::f32) return static_cast<float*>(x) + at;
  dtype == DType::f16 ? widen_block<Half>(x, at, n, buffer) : widen_block<BFloat16>(x, at, n, buffer);
  return buffer;
}
ZF_MULTIVERSION void give_back(const float* value, void* x, DType dtype, int64_t at, int64_t n) {
  if (x == nullptr || dtype == DType::f32) return;
  dtype == DType::f16 ? narrow_block<Half>(value, at, n, x) : narrow_block<BFloat16>(value, at, n, x);
}

void step_piece(const StepJob& job, const StepTensor& t, int64_t begin, int64_t end) {
  if (t.dtype == DType::f64) {
    auto place = [&](void* x) { return x == nullptr ? nullptr : static_cast<double*>(x) + begin; };
    const double* g = static_cast<const double*>(t.grad) + begin;
    run_double(job.wide, job.kind, job.flags,
               {place(t.param), g, place(t.first), place(t.second), t.mask, begin, end - begin});
    return;
  }
  alignas(64) float buffer[4][kBlock];
  const int64_t step = t.dtype == DType::f32 ? end - begin : kBlock;
  for (int64_t at = begin; at < end; at += step) {
    const int64_t n = std::min(step, end - at);
    float* w = take(t.param, t.dtype, at, n, buffer[0]);
    const float* g = take(const_cast<void*>(t.grad), t.dtype, at, n, buffer[1]);
    float* m = take(t.first, t.state, at, n, buffer[2]);
    float* v = take(t.second, t.state, at, n, buffer[3]);
    run_single(job.single, job.kind, job.flags, {w, g, m, v, t.mask, at, n});
    give_back(w, t.param, t.dtype, at, n);
    give_back(m, t.first, t.state, at, n);
    give_back(v, t.second, t.state, at, n);
  }
}

void masked_step_cpu(const std::vector<Tensor>& param, const std::vector<Tensor>& first,
                     const std::vector<Tensor>& second, const std::vector<Tensor>& grad,
                     const std::vector<Tensor>& mask, std::string rule, int64_t step, double lr, double weight_decay,
                     double momentum, double dampening, bool nesterov, double beta1, double beta2, double eps,
                     bool maximize) {
  const rule::StepOptions options{rule != "sgd", rule == "adamw", nesterov,  maximize, step,  lr,
                                  weight_decay,  momentum,        dampening, beta1,    beta2, eps};
  const StepJob job{rule::step_rule<float>(options), rule::step_rule<double>(options), rule::step_kind(options),
                    rule::step_flags(options)};
  const size_t count = param.size();
  STD_TORCH_CHECK(grad.size() == count && (mask.empty() || mask.size() == count) &&
                      first.size() == (job.kind == rule::kStepPlain ? 0 : count) &&
                      second.size() == (job.kind == rule::kStepAdam ? count : 0),
                  "masked_step_: malformed lists");
  std::vector<Tensor> keep;
  std::vector<StepTensor> tensor;
  std::vector<std::pair<size_t, int64_t>> piece;  // tensor, first element
  for (size_t j = 0; j < count; ++j) {
    const int64_t size = param[j].numel();
    const DType dtype = dtype_of("masked_step_", param[j]);
    STD_TORCH_CHECK(param[j].is_contiguous(), "masked_step_: 'param' must be contiguous");
    STD_TORCH_CHECK(grad[j].numel() == size && grad[j].scalar_type() == param[j].scalar_type(),
                    "masked_step_: malformed 'grad'");
    keep.push_back(as_contiguous(grad[j]));
    StepTensor t{param[j].mutable_data_ptr(),
                 nullptr,
                 nullptr,
                 keep.back().const_data_ptr(),
                 mask_bits("masked_step_", mask, j, size),
                 size,
                 dtype,
                 dtype};
    for (const auto* list : {&first, &second}) {
      if (list->empty()) continue;
      const Tensor& state = (*list)[j];
      const DType own = dtype_of("masked_step_", state);
      STD_TORCH_CHECK(state.numel() == size && state.is_contiguous() && own == dtype_of("masked_step_", first[j]) &&
                          (own == dtype || (own == DType::f32 && dtype != DType::f64)),
                      "masked_step_: malformed state");
      t.state = own;
      (list == &first ? t.first : t.second) = state.mutable_data_ptr();
    }
    tensor.push_back(t);
    for (int64_t at = 0; at < size; at += kPiece) piece.emplace_back(j, at);
  }
  torch::stable::parallel_for(0, int64_t(piece.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [j, at] = piece[size_t(p)];
      step_piece(job, tensor[j], at, std::min(at + kPiece, tensor[j].size));
    }
  });
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("masked_step_", TORCH_BOX(&zipfast::masked_step_cpu)); }
