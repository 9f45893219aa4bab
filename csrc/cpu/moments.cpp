// SPDX-License-Identifier: Apache-2.0
// moments_ on the CPU: symmetric streaming co-moments straight from the feature tensors (shifted sums; Chan, Golub and
// LeVeque 1983, section 2).
//
// Samples are cut into panels (panel.h).  Two ways to share the work, chosen by shape alone, so that the bits depend on
// nothing else (not on the thread count, not on torch's precision flags):
//   slots   few features: the panels are dealt to a fixed number of slots; each slot has a float64 matrix of its own,
//           and the matrices are added in order.
//   blocks  many features: panel by panel; packing is shared by sliver, products by block of the upper triangle, and
//           every block has one owner.
// Cost: S F^2 / 2 multiply-adds; features are read once.  Memory: one panel (slots: one panel and F^2 float64 each).
#include <climits>
#include <cstdlib>
#include <string>

#include "cpu/panel.h"
#include "stable.h"

namespace zipfast {
namespace {

using cpu::Range;
using cpu::Source;

constexpr int64_t kSlots = 8;          // upper bound of the parallelism in the few-features way
constexpr int64_t kFewFeatures = 384;  // up to here a slot's matrix and panel stay in the second-level cache
constexpr int64_t kPanelBytes = 512 << 10;
constexpr int64_t kBlock = 192;  // features along a side of a block: two slices of a panel fit that cache
constexpr int64_t kNoBadValue = INT64_MAX;

// What one processor's code offers; all three are instances of the same templates.
struct Kernels {
  int sliver, lanes;
  int64_t acc_bytes;
  // Packs sliver j; writes its feature sums.
  void (*pack)(DType, const Source&, const Range&, int64_t j, void* panel, void* rows, double* sums);
  void (*product)(const void* panel, int64_t samples, int64_t features, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                  double* c, cpu::Fetch* fetch);
};

template <class S>
ZF_INLINE void pack_any(DType dtype, const Source& src, const Range& range, int64_t j, void* panel, void* rows,
                        double* sums) {
  using acc_t = typename S::acc_t;
  acc_t* sliver = static_cast<acc_t*>(panel) + j * cpu::panel_stride<S>(range.samples());
  acc_t* scratch = static_cast<acc_t*>(rows);
  if constexpr (sizeof(acc_t) == 8) {
    cpu::pack_sliver<S, double>(src, range, j, sliver, scratch, sums);
  } else {
    if (dtype == DType::f32)
      cpu::pack_sliver<S, float>(src, range, j, sliver, scratch, sums);
    else if (dtype == DType::f16)
      cpu::pack_sliver<S, Half>(src, range, j, sliver, scratch, sums);
    else
      cpu::pack_sliver<S, BFloat16>(src, range, j, sliver, scratch, sums);
  }
}

#define ZF_KERNELS(name, target, ...)                                                                             \
  target void name##_pack(DType t, const Source& s, const Range& r, int64_t j, void* p, void* w, double* u) {     \
    pack_any<cpu::Shape<__VA_ARGS__>>(t, s, r, j, p, w, u);                                                       \
  }                                                                                                               \
  target void name##_product(const void* p, int64_t n, int64_t f, int64_t i0, int64_t i1, int64_t j0, int64_t j1, \
                             double* c, cpu::Fetch* fetch) {                                                      \
    using S = cpu::Shape<__VA_ARGS__>;                                                                            \
    cpu::product_block<S>(static_cast<const S::acc_t*>(p), n, f, i0, i1, j0, j1, c, fetch);                       \
  }                                                                                                               \
  const Kernels name{cpu::Shape<__VA_ARGS__>::kSliver, cpu::Shape<__VA_ARGS__>::kLanes,                           \
                     sizeof(cpu::Shape<__VA_ARGS__>::acc_t), &name##_pack, &name##_product};

ZF_KERNELS(base_f32, , float, 4, 2, 4)
ZF_KERNELS(base_f64, , double, 2, 2, 4)
#if defined(__x86_64__)
#define ZF_AVX2 __attribute__((target("arch=x86-64-v3")))
#define ZF_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
ZF_KERNELS(avx2_f32, ZF_AVX2, float, 8, 2, 4)
ZF_KERNELS(avx2_f64, ZF_AVX2, double, 4, 2, 4)
ZF_KERNELS(avx512_f32, ZF_AVX512, float, 16, 2, 8)
ZF_KERNELS(avx512_f64, ZF_AVX512, double, 8, 2, 8)
#endif

// ZIPFAST_SIMD=avx2 or baseline uses less than the processor has, so that every path can be tested on one machine.
const Kernels& kernels(bool f64) {
#if defined(__x86_64__)
  static const std::string most = std::getenv("ZIPFAST_SIMD") ? std::getenv("ZIPFAST_SIMD") : "avx512";
  static const bool avx512 = most == "avx512" && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  static const bool avx2 = most != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return f64 ? avx512_f64 : avx512_f32;
  if (avx2) return f64 ? avx2_f64 : avx2_f32;
#endif
  return f64 ? base_f64 : base_f32;
}

// The samples of a space, cut into panels of about `longest` samples each, and never more than that.
class Panels {
 public:
  Panels(const Source& s, int64_t longest) : outer_(s.outer), inner_(s.inner) {
    if (outer_ * inner_ == 0) return;
    if (inner_ <= longest) {
      const int64_t slices = longest / inner_;
      count_ = (outer_ + slices - 1) / slices;
    } else {
      pieces_ = (inner_ + longest - 1) / longest;
      count_ = outer_ * pieces_;
    }
  }
  int64_t count() const { return count_; }
  Range operator[](int64_t p) const {
    if (!pieces_) return {cut(outer_, p, count_), cut(outer_, p + 1, count_), 0, inner_};
    const int64_t o = p / pieces_, q = p % pieces_;
    return {o, o + 1, cut(inner_, q, pieces_), cut(inner_, q + 1, pieces_)};
  }

 private:
  static int64_t cut(int64_t n, int64_t p, int64_t parts) { return n * p / parts; }
  int64_t outer_, inner_, count_ = 0, pieces_ = 0;
};

struct Space {
  DType dtype;
  Source src;
  int64_t seen;
  double *comoment, *total;  // [F, F], [F]
  int64_t* bad;              // [models]
};

// Lowers bad[model] to the first value of a feature in this range that is not finite.  Called only where a sum of the
// range is not finite; a sum of finite values that overflows finds nothing.
void note_bad(const Space& s, const Range& r, int64_t f, int64_t* bad) {
  const int64_t m = f / s.src.size, d = f % s.src.size;
  dispatch(s.dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    const scalar_t* x = static_cast<const scalar_t*>(s.src.x[m]);
    for (int64_t o = r.outer0; o < r.outer1; ++o)
      for (int64_t i = r.inner0; i < r.inner1; ++i)
        if (!std::isfinite(widen(x[(o * s.src.size + d) * s.src.inner + i]))) {
          bad[m] = std::min(bad[m], (s.seen + o * s.src.inner + i) * s.src.size + d);
          return;
        }
  });
}

// Packs slivers [j0, j1) of a range and books their sums.
void pack_slivers(const Kernels& k, const Space& s, const Range& r, int64_t j0, int64_t j1, void* panel, void* rows,
                  double* total, int64_t* bad) {
  double sums[64];
  const int64_t features = s.src.features();
  for (int64_t j = j0; j < j1; ++j) {
    k.pack(s.dtype, s.src, r, j, panel, rows, sums);
    for (int64_t c = 0; c < k.sliver && j * k.sliver + c < features; ++c) {
      total[j * k.sliver + c] += sums[c];
      if (!std::isfinite(sums[c])) note_bad(s, r, j * k.sliver + c, bad);
    }
  }
}

// Where the features of a range lie, if each is one piece of memory; else nothing.
cpu::Fetch lines_of(const Space& s, const Range& r, std::vector<const char*>* starts) {
  const Source& src = s.src;
  if (r.outer1 - r.outer0 != 1 || src.inner == 1) return {};
  const int64_t bytes = s.dtype == DType::f64 ? 8 : s.dtype == DType::f32 ? 4 : 2;
  starts->resize(src.features());
  for (int64_t f = 0; f < src.features(); ++f)
    (*starts)[f] = static_cast<const char*>(src.x[f / src.size]) +
                   ((r.outer0 * src.size + f % src.size) * src.inner + r.inner0) * bytes;
  return {starts->data(), src.features(), r.samples() * bytes};
}

int64_t panel_bytes(const Kernels& k, int64_t features, int64_t samples) {
  const int64_t slivers = (features + k.sliver - 1) / k.sliver, rows = (samples + k.lanes - 1) / k.lanes * k.lanes;
  return slivers * k.sliver * rows * k.acc_bytes;
}

void by_slots(const Kernels& k, const Space& s) {
  const int64_t F = s.src.features(), slivers = (F + k.sliver - 1) / k.sliver;
  const int64_t longest = std::clamp<int64_t>(kPanelBytes / (F * k.acc_bytes), 64, cpu::kMaxPanel);
  const Panels panels(s.src, longest);
  const int64_t slots = std::min(kSlots, panels.count());
  if (slots == 0) return;
  std::vector<double> comoment(slots * F * F), total(slots * F);
  std::vector<int64_t> bad(slots * s.src.models, kNoBadValue);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    auto panel = cpu::buffer<char>(panel_bytes(k, F, longest));
    std::vector<const char*> starts;
    auto rows = cpu::buffer<char>(k.lanes * (cpu::kMaxPanel + k.lanes) * k.acc_bytes);
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t p = panels.count() * slot / slots; p < panels.count() * (slot + 1) / slots; ++p) {
        const Range r = panels[p];
        pack_slivers(k, s, r, 0, slivers, panel.get(), rows.get(), &total[slot * F], &bad[slot * s.src.models]);
        cpu::Fetch fetch;
        if (p + 1 < panels.count()) fetch = lines_of(s, panels[p + 1], &starts);
        k.product(panel.get(), r.samples(), F, 0, slivers, 0, slivers, &comoment[slot * F * F], &fetch);
      }
  });
  for (int64_t slot = 0; slot < slots; ++slot) {
    for (int64_t i = 0; i < F; ++i) {
      s.total[i] += total[slot * F + i];
      for (int64_t j = i; j < F; ++j) s.comoment[i * F + j] += comoment[(slot * F + i) * F + j];
    }
    for (int64_t m = 0; m < s.src.models; ++m) s.bad[m] = std::min(s.bad[m], bad[slot * s.src.models + m]);
  }
}

void by_blocks(const Kernels& k, const Space& s) {
  const int64_t F = s.src.features(), slivers = (F + k.sliver - 1) / k.sliver, models = s.src.models;
  const Panels panels(s.src, cpu::kMaxPanel);
  const int64_t side = std::max<int64_t>(1, kBlock / k.sliver), blocks = (slivers + side - 1) / side;
  std::vector<std::pair<int64_t, int64_t>> todo;
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t j = i; j < blocks; ++j) todo.push_back({i, j});
  auto panel = cpu::buffer<char>(panel_bytes(k, F, cpu::kMaxPanel));
  std::vector<int64_t> bad(slivers * models, kNoBadValue);
  for (int64_t p = 0; p < panels.count(); ++p) {
    const Range r = panels[p];
    torch::stable::parallel_for(0, slivers, 1, [&](int64_t begin, int64_t end) {
      auto rows = cpu::buffer<char>(k.lanes * (cpu::kMaxPanel + k.lanes) * k.acc_bytes);
      for (int64_t j = begin; j < end; ++j)
        pack_slivers(k, s, r, j, j + 1, panel.get(), rows.get(), s.total, &bad[j * models]);
    });
    torch::stable::parallel_for(0, int64_t(todo.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto [i, j] = todo[t];
        k.product(panel.get(), r.samples(), F, i * side, std::min(slivers, (i + 1) * side), j * side,
                  std::min(slivers, (j + 1) * side), s.comoment, nullptr);
      }
    });
  }
  for (int64_t j = 0; j < slivers; ++j)
    for (int64_t m = 0; m < models; ++m) s.bad[m] = std::min(s.bad[m], bad[j * models + m]);
}

void moments_cpu(const std::vector<Tensor>& comoment, const std::vector<Tensor>& total, const std::vector<Tensor>& bad,
                 const std::vector<Tensor>& features, const std::vector<Tensor>& shift,
                 const std::vector<int64_t>& axis, const std::vector<int64_t>& seen, std::string) {
  const size_t spaces = comoment.size();
  STD_TORCH_CHECK(spaces && total.size() == spaces && bad.size() == spaces && shift.size() == spaces &&
                      axis.size() == spaces && seen.size() == spaces && features.size() % spaces == 0,
                  "moments_: malformed lists");
  const int64_t models = int64_t(features.size() / spaces);
  for (size_t i = 0; i < spaces; ++i) {
    std::vector<Tensor> own;
    std::vector<const void*> data;
    for (int64_t m = 0; m < models; ++m) {
      own.push_back(as_contiguous(features[i * models + m]));
      data.push_back(own.back().const_data_ptr());
      STD_TORCH_CHECK(own.back().numel() == own[0].numel() && own.back().scalar_type() == own[0].scalar_type(),
                      "moments_: malformed features");
    }
    const AxisView view(own[0], axis[i]);
    const int64_t F = models * view.size;
    const Tensor shift_i = as_contiguous(shift[i]);
    STD_TORCH_CHECK(comoment[i].numel() == F * F && comoment[i].is_contiguous() && total[i].numel() == F &&
                        total[i].is_contiguous() && bad[i].numel() == models && bad[i].is_contiguous() &&
                        shift_i.numel() == F,
                    "moments_: malformed accumulators");
    if (F == 0) continue;
    const Space s{dtype_of("moments_", own[0]),
                  {data.data(), shift_i.const_data_ptr<double>(), models, view.size, view.outer, view.inner},
                  seen[i],
                  comoment[i].mutable_data_ptr<double>(),
                  total[i].mutable_data_ptr<double>(),
                  bad[i].mutable_data_ptr<int64_t>()};
    const Kernels& k = kernels(s.dtype == DType::f64);
    if (F <= kFewFeatures)
      by_slots(k, s);
    else
      by_blocks(k, s);
  }
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("moments_", TORCH_BOX(&zipfast::moments_cpu)); }
