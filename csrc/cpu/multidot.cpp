// SPDX-License-Identifier: Apache-2.0
// multidot on the CPU: <g_j, x_ij> for all models i and tensors j (learned soups, Wortsman et al. 2022, section 2).
//
// Work is cut into pieces of kPiece elements of one tensor; kBlock elements of g are widened at a time and stay in the
// first cache while they meet the same elements of every model: short runs of many streams are what the processor
// fetches best.  Products and sums are float64, in kChains * kLanes partial sums of fixed order; pieces are added in
// order at the end: the result depends on shapes alone.  Bandwidth-bound: every x is read once.
#include <cstring>

#include "cpu/simd.h"
#include "stable.h"

namespace zipfast {
namespace {

constexpr int64_t kPiece = 65536, kBlock = 128;
constexpr int kLanes = 8, kChains = 4;  // sums side by side, so that none waits for the one before
typedef double vec __attribute__((vector_size(kLanes * sizeof(double))));
typedef float narrow_vec __attribute__((vector_size(kLanes * sizeof(float))));

struct Side {
  const void* data;
  DType dtype;
};

ZF_INLINE vec load(const double* x) {
  vec v;
  memcpy(&v, x, sizeof v);
  return v;
}
template <class scalar_t>
ZF_INLINE vec load(const scalar_t* x) {
  float wide[kLanes];
  for (int l = 0; l < kLanes; ++l) wide[l] = widen(x[l]);
  narrow_vec v;
  memcpy(&v, wide, sizeof v);
  return __builtin_convertvector(v, vec);
}

template <class scalar_t>
ZF_INLINE double dot(const double* a, const scalar_t* b, int64_t n) {
  vec chain[kChains] = {};
  int64_t e = 0;
  for (; e + kChains * kLanes <= n; e += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) chain[c] += load(a + e + c * kLanes) * load(b + e + c * kLanes);
  double sum = 0;
  for (; e < n; ++e) sum += a[e] * double(widen(b[e]));
  const vec all = (chain[0] + chain[1]) + (chain[2] + chain[3]);
  for (int l = 0; l < kLanes; ++l) sum += all[l];
  return sum;
}

template <class scalar_t>
ZF_INLINE void widen_block(const scalar_t* x, double* out, int64_t n) {
  for (int64_t e = 0; e < n; ++e) out[e] = double(widen(x[e]));
}

// sum[i] += <g, x_i> over elements [at, at + n) of one tensor, n at most kBlock; g is widened once for all models.
ZF_MULTIVERSION void run_block(Side g, const Side* x, int64_t stride, int64_t models, int64_t at, int64_t n,
                               double* sum) {
  alignas(64) double wide[kBlock];
  switch (g.dtype) {
    case DType::f64:
      widen_block(static_cast<const double*>(g.data) + at, wide, n);
      break;
    case DType::f16:
      widen_block(static_cast<const Half*>(g.data) + at, wide, n);
      break;
    case DType::bf16:
      widen_block(static_cast<const BFloat16*>(g.data) + at, wide, n);
      break;
    default:
      widen_block(static_cast<const float*>(g.data) + at, wide, n);
  }
  for (int64_t i = 0; i < models; ++i) {
    const Side& other = x[i * stride];
    switch (other.dtype) {
      case DType::f64:
        sum[i] += dot(wide, static_cast<const double*>(other.data) + at, n);
        break;
      case DType::f16:
        sum[i] += dot(wide, static_cast<const Half*>(other.data) + at, n);
        break;
      case DType::bf16:
        sum[i] += dot(wide, static_cast<const BFloat16*>(other.data) + at, n);
        break;
      default:
        sum[i] += dot(wide, static_cast<const float*>(other.data) + at, n);
    }
  }
}

Tensor multidot_cpu(const std::vector<Tensor>& g, const std::vector<Tensor>& x) {
  const int64_t count = int64_t(g.size());
  STD_TORCH_CHECK(count > 0 && !x.empty() && int64_t(x.size()) % count == 0, "multidot: malformed lists");
  const int64_t models = int64_t(x.size()) / count;
  std::vector<Tensor> keep;
  auto side = [&](const Tensor& t, const Tensor& like) {
    STD_TORCH_CHECK(t.numel() == like.numel(), "multidot: malformed 'x'");
    keep.push_back(as_contiguous(t));
    return Side{keep.back().const_data_ptr(), dtype_of("multidot", t)};
  };
  std::vector<Side> left, right;
  std::vector<std::pair<int64_t, int64_t>> piece;  // tensor, first element
  for (int64_t j = 0; j < count; ++j) {
    left.push_back(side(g[j], g[j]));
    for (int64_t at = 0; at < g[j].numel(); at += kPiece) piece.emplace_back(j, at);
  }
  for (int64_t i = 0; i < models * count; ++i) right.push_back(side(x[i], g[i % count]));
  std::vector<double> part(piece.size() * size_t(models), 0.);
  torch::stable::parallel_for(0, int64_t(piece.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [j, at] = piece[size_t(p)];
      const int64_t last = std::min(at + kPiece, g[j].numel());
      for (int64_t e = at; e < last; e += kBlock)
        run_block(left[j], right.data() + j, count, models, e, std::min(kBlock, last - e), part.data() + p * models);
    }
  });
  Tensor out = torch::stable::new_empty(g[0], {models, count}, ScalarType::Double);
  double* sum = out.mutable_data_ptr<double>();
  std::fill(sum, sum + models * count, 0.);
  for (size_t p = 0; p < piece.size(); ++p)
    for (int64_t i = 0; i < models; ++i) sum[i * count + piece[p].first] += part[p * size_t(models) + size_t(i)];
  return out;
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("multidot", TORCH_BOX(&zipfast::multidot_cpu)); }
