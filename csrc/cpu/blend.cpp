// SPDX-License-Identifier: Apache-2.0
// blend_ on the CPU: out_j = sum over models of weight_ij * x_ij, many tensors in one call (Wortsman et al. 2022,
// section 2).
//
// Work is cut into pieces of kPiece elements of one tensor, each owned by one thread; inside, kBlock elements are
// summed over all models in a buffer that stays in the first cache, so that every input is read once and nothing else
// is written.  Terms are rounded before they are added (no fused multiply-add), model after model: the bits of a plain
// loop.  A block whose result is not finite is looked through for the first bad input: clean data pays one test per
// output.
#include <algorithm>
#include <atomic>
#include <limits>

#include "cpu/simd.h"
#include "stable.h"

namespace zipfast {
namespace {

constexpr int64_t kPiece = 65536, kBlock = 128;

struct Blend {
  const void* const* x;  // [models], of this tensor
  const DType* dtype;    // [models]
  const double* weight;  // [models], `stride` apart
  int64_t stride, models;
  void* out;
  DType target;
  int64_t* bad;  // [models + 1], `stride` apart
};

template <class scalar_t, class acc_t>
ZF_INLINE void add_term(const scalar_t* x, acc_t weight, acc_t* acc, int64_t n, bool first) {
  if (first)
    for (int64_t e = 0; e < n; ++e) acc[e] = acc_t(widen(x[e])) * weight;
  else
    for (int64_t e = 0; e < n; ++e) acc[e] += acc_t(widen(x[e])) * weight;
}

// The least of what is there and `value`, over threads.
inline void lower(int64_t* place, int64_t value) {
  std::atomic_ref<int64_t> shared(*place);
  int64_t seen = shared.load(std::memory_order_relaxed);
  while (value < seen && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

template <class scalar_t>
ZF_INLINE bool finite(scalar_t x) {
  const auto wide = widen(x);
  return wide - wide == 0;
}

template <class scalar_t>
ZF_INLINE int64_t first_bad(const scalar_t* x, int64_t n) {
  for (int64_t e = 0; e < n; ++e)
    if (!finite(x[e])) return e;
  return -1;
}

// Elements `at` and following, whose results are not all finite: which inputs are not, or which sum overflows although
// its own inputs are finite? Called before the results are written, as they may replace an input.
template <class acc_t>
void examine(const Blend& b, const acc_t* acc, int64_t at, int64_t n) {
  bool clean[kBlock];
  std::fill(clean, clean + n, true);
  for (int64_t i = 0; i < b.models; ++i) {
    const int64_t found = dispatch(b.dtype[i], [&](auto* tag) {
      using scalar_t = std::remove_pointer_t<decltype(tag)>;
      const scalar_t* x = static_cast<const scalar_t*>(b.x[i]) + at;
      for (int64_t e = 0; e < n; ++e) clean[e] &= finite(x[e]);
      return first_bad(x, n);
    });
    if (found >= 0) lower(b.bad + i * b.stride, at + found);
  }
  dispatch(b.target, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    for (int64_t e = 0; e < n; ++e)
      if (clean[e] && !finite(narrow<scalar_t>(double(acc[e])))) return lower(b.bad + b.models * b.stride, at + e);
  });
}

template <class scalar_t, class acc_t>
ZF_INLINE bool all_finite(const acc_t* acc, int64_t n) {
  constexpr int64_t kLanes = 16;  // so that no sum waits for the one before
  acc_t lane[kLanes] = {};        // each 0, or NaN from then on
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const auto value = widen(narrow<scalar_t>(double(acc[e + l])));
      lane[l] += acc_t(value - value);
    }
  acc_t excess = 0;
  for (; e < n; ++e) {
    const auto value = widen(narrow<scalar_t>(double(acc[e])));
    excess += acc_t(value - value);
  }
  for (int64_t l = 0; l < kLanes; ++l) excess += lane[l];
  return excess == 0;
}

template <class scalar_t, class acc_t>
ZF_INLINE void write(const Blend& b, const acc_t* acc, int64_t at, int64_t n) {
  if (!all_finite<scalar_t>(acc, n)) examine(b, acc, at, n);
  scalar_t* out = static_cast<scalar_t*>(b.out) + at;
  for (int64_t e = 0; e < n; ++e) out[e] = narrow<scalar_t>(double(acc[e]));
}

template <class acc_t>
ZF_INLINE void blend_piece(const Blend& b, int64_t begin, int64_t end) {
  alignas(64) acc_t acc[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t i = 0; i < b.models; ++i) {
      const acc_t weight = acc_t(b.weight[i * b.stride]);
      switch (b.dtype[i]) {
        case DType::f32:
          add_term(static_cast<const float*>(b.x[i]) + at, weight, acc, n, i == 0);
          break;
        case DType::f64:
          add_term(static_cast<const double*>(b.x[i]) + at, weight, acc, n, i == 0);
          break;
        case DType::f16:
          add_term(static_cast<const Half*>(b.x[i]) + at, weight, acc, n, i == 0);
          break;
        case DType::bf16:
          add_term(static_cast<const BFloat16*>(b.x[i]) + at, weight, acc, n, i == 0);
          break;
      }
    }
    switch (b.target) {
      case DType::f32:
        write<float>(b, acc, at, n);
        break;
      case DType::f64:
        write<double>(b, acc, at, n);
        break;
      case DType::f16:
        write<Half>(b, acc, at, n);
        break;
      case DType::bf16:
        write<BFloat16>(b, acc, at, n);
        break;
    }
  }
}

ZF_MULTIVERSION void run_single(const Blend& b, int64_t begin, int64_t end) { blend_piece<float>(b, begin, end); }
ZF_MULTIVERSION void run_double(const Blend& b, int64_t begin, int64_t end) { blend_piece<double>(b, begin, end); }

void blend_cpu(const std::vector<Tensor>& out, Tensor bad, const std::vector<Tensor>& x, const Tensor& weight_) {
  const int64_t count = int64_t(out.size());
  STD_TORCH_CHECK(count > 0 && !x.empty() && int64_t(x.size()) % count == 0, "blend_: malformed lists");
  const int64_t models = int64_t(x.size()) / count;
  const Tensor weight = as_contiguous(weight_);
  STD_TORCH_CHECK(weight.numel() == models * count && bad.numel() == (models + 1) * count && bad.is_contiguous(),
                  "blend_: malformed 'weight' or 'bad'");
  std::vector<Tensor> input;
  std::vector<const void*> data(x.size());  // [count, models]
  std::vector<DType> dtype(x.size());
  std::vector<Blend> blend;
  std::vector<char> wide(out.size(), 0);
  std::vector<std::pair<int64_t, int64_t>> piece;  // tensor, first element
  for (int64_t j = 0; j < count; ++j) {
    STD_TORCH_CHECK(out[j].is_contiguous(), "blend_: 'out' must be contiguous");
    for (int64_t i = 0; i < models; ++i) {
      const Tensor& t = x[i * count + j];
      STD_TORCH_CHECK(t.numel() == out[j].numel(), "blend_: malformed 'x'");
      input.push_back(as_contiguous(t));
      data[j * models + i] = input.back().const_data_ptr();
      dtype[j * models + i] = dtype_of("blend_", t);
      wide[j] |= dtype[j * models + i] == DType::f64;
    }
    blend.push_back({data.data() + j * models, dtype.data() + j * models, weight.const_data_ptr<double>() + j, count,
                     models, out[j].mutable_data_ptr(), dtype_of("blend_", out[j]),
                     bad.mutable_data_ptr<int64_t>() + j});
    wide[j] |= blend.back().target == DType::f64;
    for (int64_t at = 0; at < out[j].numel(); at += kPiece) piece.emplace_back(j, at);
  }
  torch::stable::parallel_for(0, int64_t(piece.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [j, at] = piece[size_t(p)];
      const int64_t last = std::min(at + kPiece, out[j].numel());
      (wide[j] ? run_double : run_single)(blend[size_t(j)], at, last);
    }
  });
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("blend_", TORCH_BOX(&zipfast::blend_cpu)); }
