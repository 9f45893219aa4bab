// SPDX-License-Identifier: Apache-2.0
// zip_match on the CPU: exact greedy matching (Stoica et al. 2024, section 4.3) with row maxima and write stamps.
//
// Per slot the kernel keeps an upper bound of its row (`bound`), the column where it is attained (`arg`) and whether
// the bound may have become too large (`stale`).  Rules, each asserted in debug builds:
//   1. bound[k] >= every allowed value of row k; equality holds, at the first such column arg[k], unless stale[k].
//   2. Entry (r, c) lives in the row of r or c that was written later: a merge writes its row only, never its column.
//      Before row k is read, `refresh` fetches the columns that others wrote since (each from the writer's row).
//   3. A pair is forbidden if the slots share an exhausted model or one of them left the pool (rule::forbids).
//   4. In compat mode a forbidden pair's -inf is inherited by the merged row; in strict mode the raw value is, as the
//      budgets may be lifted later.
// No step assumes that similarities fall: with alpha < 1 a merge raises negative ones.
//
// Cost: O(F^2) plus row rescans (about 2 to 5 per merge on real networks), memory one copy of the matrix.  Spaces run
// in parallel, one thread each; within a space the order is sequential, so results do not depend on the thread count.
#include <cassert>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/simd.h"
#include "rule.h"
#include "stable.h"

namespace zipfast {
namespace {

template <class scalar_t>
struct Space {
  const scalar_t* sim;  // [n, n]
  int n, models, keep;
  int64_t budget;
  scalar_t alpha;
  bool compat;
  int64_t* group;   // [n]
  int64_t* pair;    // [n - keep, 2]
  scalar_t* value;  // [n - keep]
  int64_t* status;  // [kStatusFields]
};

// Largest allowed value of a row; -inf if there is none.
template <class scalar_t>
ZF_INLINE scalar_t row_max(const scalar_t* row, const int32_t* models, int32_t forbidden, int n) {
  scalar_t best = -std::numeric_limits<scalar_t>::infinity();
#pragma omp simd reduction(max : best)
  for (int c = 0; c < n; ++c) {
    const scalar_t v = models[c] & forbidden ? -std::numeric_limits<scalar_t>::infinity() : row[c];
    best = v > best ? v : best;
  }
  return best;
}

// First allowed column that holds `best`; the caller knows that there is one.
template <class scalar_t>
ZF_INLINE int row_find(const scalar_t* row, const int32_t* models, int32_t forbidden, int n, scalar_t best) {
  constexpr int kBlock = 64;
  int c = 0;
  for (; c + kBlock <= n; c += kBlock) {
    int hit = 0;
#pragma omp simd reduction(| : hit)
    for (int d = c; d < c + kBlock; ++d) hit |= (row[d] == best) & !(models[d] & forbidden);
    if (hit) break;
  }
  while (!(row[c] == best && !(models[c] & forbidden))) ++c;
  return c;
}

template <class scalar_t>
ZF_INLINE scalar_t vector_max(const scalar_t* x, int n) {
  scalar_t best = -std::numeric_limits<scalar_t>::infinity();
#pragma omp simd reduction(max : best)
  for (int c = 0; c < n; ++c) best = x[c] > best ? x[c] : best;
  return best;
}

// Row i := alpha * min(row i, row j), in place.
template <class scalar_t>
ZF_INLINE void merge_rows(scalar_t* row_i, const scalar_t* row_j, const int32_t* models, int32_t forbids_i,
                          int32_t forbids_j, int n, scalar_t alpha, bool compat) {
  if (compat) {
    const int32_t forbidden = forbids_i | forbids_j;
#pragma omp simd
    for (int c = 0; c < n; ++c) {
      const scalar_t v = rule::merged_similarity(alpha, row_i[c], row_j[c]);
      row_i[c] = models[c] & forbidden ? -std::numeric_limits<scalar_t>::infinity() : v;
    }
  } else {
#pragma omp simd
    for (int c = 0; c < n; ++c) row_i[c] = rule::merged_similarity(alpha, row_i[c], row_j[c]);
  }
}

// Rows that the merge (i, j) touched: bounds rise, attainers move, bounds go stale (rule 1).
template <class scalar_t>
ZF_INLINE void update_bounds(const scalar_t* merged, int i, int j, const int32_t* models, int32_t exhausted, int n,
                             scalar_t* bound, int32_t* arg, uint8_t* stale) {
  for (int k = 0; k < n; ++k) {
    if (models[k] < 0 || k == i) continue;
    const bool forbidden = models[i] & rule::forbids(models[k], exhausted);
    const scalar_t w = forbidden ? -std::numeric_limits<scalar_t>::infinity() : merged[k];
    if (w > bound[k]) {
      bound[k] = w;
      arg[k] = i;
      stale[k] = 0;
    } else if (!stale[k]) {
      if (arg[k] == i || arg[k] == j) {
        if (w == bound[k])
          arg[k] = i;
        else
          stale[k] = 1;
      } else if (w == bound[k] && i < arg[k]) {
        arg[k] = i;
      }
    }
  }
}

template <class scalar_t>
class Matcher {
 public:
  explicit Matcher(const Space<scalar_t>& s)
      : s_(s),
        n_(s.n),
        sim_(size_t(s.n) * s.n),
        models_(s.n),
        bound_(s.n),
        arg_(s.n, -1),
        stale_(s.n, 0),
        refreshed_(s.n, 0),
        written_(s.n, 0),
        writer_(s.n + 1, -1),
        parent_(s.n),
        left_(s.models, s.budget) {
    for (int k = 0; k < n_; ++k) {
      models_[k] = 1 << (k / (n_ / s.models));
      parent_[k] = k;
    }
    if (!s.compat && s.budget <= 0) exhausted_ = everything();
  }

  ZF_INLINE void run() {
    for (int f = 0; f < rule::kStatusFields; ++f) s_.status[f] = f == rule::kLifted ? 0 : -1;
    std::fill_n(s_.group, n_, -1);
    const int merges = n_ - s_.keep;
    std::fill_n(s_.pair, 2 * merges, -1);
    std::fill_n(s_.value, merges, std::numeric_limits<scalar_t>::quiet_NaN());
    if (!copy_checked()) return;
    rescan_all();
    for (time_ = 0; time_ < merges;) {
      const int r = best_row();
      if (r < 0) {
        if (!s_.compat && exhausted_) {  // groups only gain models: no pair will be allowed again, so lift once
          exhausted_ = 0;
          s_.status[rule::kLifted] = merges - time_;
          rescan_all();
          continue;
        }
        s_.status[rule::kDeadlock] = time_;
        if (s_.status[rule::kLifted]) s_.status[rule::kLifted] -= merges - time_;  // those that were not made after all
        return;
      }
      merge(std::min(r, arg_[r]), std::max(r, arg_[r]), bound_[r]);
    }
    label();
  }

 private:
  static constexpr scalar_t kNone = -std::numeric_limits<scalar_t>::infinity();

  int32_t everything() const { return int32_t((1u << s_.models) - 1); }
  scalar_t* row(int k) { return sim_.data() + size_t(k) * n_; }
  int32_t forbids(int k) const { return rule::forbids(models_[k], exhausted_); }

  // Copies the matrix, diagonal -inf, and looks for NaN and asymmetry in the same pass, tile by tile so that the
  // transposed reads stay in cache.
  ZF_INLINE bool copy_checked() {
    constexpr int kTile = 64;
    const scalar_t* in = s_.sim;
    int64_t nan_at = -1, asymmetric_at = -1;
    for (int k = 0; k < n_; ++k) {
      scalar_t* out = row(k);
      std::memcpy(out, in + size_t(k) * n_, sizeof(scalar_t) * n_);
      out[k] = kNone;
      int bad = 0;
#pragma omp simd reduction(| : bad)
      for (int c = 0; c < n_; ++c) bad |= out[c] != out[c];
      if (bad && nan_at < 0) {
        int c = 0;
        while (out[c] == out[c]) ++c;
        nan_at = int64_t(k) * n_ + c;
      }
    }
    if (nan_at < 0) {
      for (int i0 = 0; i0 < n_; i0 += kTile) {
        const int i1 = std::min(n_, i0 + kTile);
        bool wrong = false;
        for (int j0 = i0; j0 < n_ && !wrong; j0 += kTile) {
          const int j1 = std::min(n_, j0 + kTile);
          for (int i = i0; i < i1; ++i)
            for (int j = std::max(i + 1, j0); j < j1; ++j) wrong |= in[size_t(i) * n_ + j] != in[size_t(j) * n_ + i];
        }
        for (int i = i0; wrong && asymmetric_at < 0; ++i)
          for (int j = i + 1; j < n_ && asymmetric_at < 0; ++j)
            if (in[size_t(i) * n_ + j] != in[size_t(j) * n_ + i]) asymmetric_at = int64_t(i) * n_ + j;
        if (wrong) break;
      }
    }
    s_.status[rule::kNanAt] = nan_at;
    s_.status[rule::kAsymmetricAt] = asymmetric_at;
    return nan_at < 0 && asymmetric_at < 0;
  }

  // Rule 2: brings row k up to date.
  ZF_INLINE void refresh(int k) {
    scalar_t* r = row(k);
    for (int q = refreshed_[k] + 1; q <= time_; ++q) {
      const int s = writer_[q];
      if (written_[s] == q && s != k && parent_[s] == s) r[s] = sim_[size_t(s) * n_ + k];
    }
    refreshed_[k] = time_;
  }

  ZF_INLINE void rescan(int k) {
    bound_[k] = row_max(row(k), models_.data(), forbids(k), n_);
    arg_[k] = bound_[k] == kNone ? -1 : row_find(row(k), models_.data(), forbids(k), n_, bound_[k]);
    stale_[k] = 0;
  }

  ZF_INLINE void rescan_all() {
    for (int k = 0; k < n_; ++k) {
      if (models_[k] < 0) continue;
      refresh(k);
      rescan(k);
    }
  }

  // First row that attains the overall maximum; -1 if every pair is forbidden.
  ZF_INLINE int best_row() {
    for (;;) {
      const scalar_t best = vector_max(bound_.data(), n_);
      if (best == kNone) return -1;
      int r = 0;
      while (bound_[r] != best) ++r;
      if (!stale_[r]) {
        assert(arg_[r] > r && row(r) && !(models_[arg_[r]] & forbids(r)));
        return r;
      }
      refresh(r);
      rescan(r);
    }
  }

  ZF_INLINE void merge(int i, int j, scalar_t value) {
    s_.pair[2 * time_] = i;
    s_.pair[2 * time_ + 1] = j;
    s_.value[time_] = value;
    refresh(i);
    refresh(j);
    merge_rows(row(i), row(j), models_.data(), forbids(i), forbids(j), n_, s_.alpha, s_.compat);
    row(i)[i] = kNone;

    const int32_t shared = models_[i] & models_[j];
    if (!s_.compat) models_[i] |= models_[j];
    models_[j] |= rule::kGone;
    parent_[j] = i;
    retire(j);
    ++time_;
    writer_[time_] = i;
    written_[i] = refreshed_[i] = time_;
    if (s_.alpha == 0) models_[i] |= rule::kGone;
    update_bounds(row(i), i, j, models_.data(), exhausted_, n_, bound_.data(), arg_.data(), stale_.data());
    if (s_.alpha == 0)
      retire(i);
    else
      rescan(i);
    if (shared && s_.status[rule::kLifted] == 0) charge(shared);
  }

  void retire(int k) {
    bound_[k] = kNone;
    arg_[k] = -1;
    stale_[k] = 0;
  }

  ZF_INLINE void charge(int32_t shared) {
    int32_t now = exhausted_;
    for (int m = 0; m < s_.models; ++m)
      if (shared >> m & 1 && --left_[m] <= 0) now |= 1 << m;
    if (now == exhausted_) return;
    exhausted_ = now;
    for (int k = 0; k < n_; ++k)
      if (models_[k] >= 0 && !stale_[k] && arg_[k] >= 0 && (models_[arg_[k]] & forbids(k))) stale_[k] = 1;
  }

  void label() {
    int64_t next = 0;
    for (int k = 0; k < n_; ++k) s_.group[k] = parent_[k] == k ? next++ : s_.group[parent_[k]];  // parent_[k] < k
    assert(next == s_.keep);
  }

  Space<scalar_t> s_;
  int n_, time_ = 0;
  int32_t exhausted_ = 0;
  std::vector<scalar_t> sim_;
  std::vector<int32_t> models_;  // models of each slot, and kGone
  std::vector<scalar_t> bound_;
  std::vector<int32_t> arg_;
  std::vector<uint8_t> stale_;
  std::vector<int32_t> refreshed_, written_, writer_;  // merge counts; writer_[q]: the slot that merge q wrote
  std::vector<int32_t> parent_;
  std::vector<int64_t> left_;
};

ZF_MULTIVERSION void run_space(Matcher<float>& m) { m.run(); }
ZF_MULTIVERSION void run_space(Matcher<double>& m) { m.run(); }

std::tuple<Tensor, Tensor, Tensor, Tensor> zip_match_cpu(const std::vector<Tensor>& sim, int64_t models,
                                                         const std::vector<int64_t>& keep,
                                                         const std::vector<int64_t>& budget, double alpha, bool compat,
                                                         std::string) {
  const int64_t spaces = int64_t(sim.size());
  STD_TORCH_CHECK(spaces > 0 && keep.size() == sim.size() && budget.size() == sim.size() && models > 0 && models < 32,
                  "zip_match: malformed arguments");
  std::vector<Tensor> input;
  std::vector<int64_t> feature_at{0}, merge_at{0};
  for (int64_t s = 0; s < spaces; ++s) {
    const int64_t n = sim[s].size(0);
    STD_TORCH_CHECK(sim[s].dim() == 2 && n == sim[s].size(1) && n > 0 && n % models == 0 && n < (1 << 30) &&
                        keep[s] >= 1 && keep[s] <= n,
                    "zip_match: malformed similarity");
    input.push_back(as_contiguous(sim[s]));
    feature_at.push_back(feature_at.back() + n);
    merge_at.push_back(merge_at.back() + n - keep[s]);
  }
  using torch::stable::new_empty;
  Tensor group = new_empty(sim[0], {feature_at.back()}, ScalarType::Long);
  Tensor pair = new_empty(sim[0], {merge_at.back(), 2}, ScalarType::Long);
  Tensor value = new_empty(sim[0], {merge_at.back()});
  Tensor status = new_empty(sim[0], {spaces, int64_t(rule::kStatusFields)}, ScalarType::Long);
  auto run = [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    torch::stable::parallel_for(0, spaces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        Matcher<scalar_t> m({static_cast<const scalar_t*>(input[s].const_data_ptr()), int(sim[s].size(0)), int(models),
                             int(keep[s]), budget[s], scalar_t(alpha), compat,
                             group.mutable_data_ptr<int64_t>() + feature_at[s],
                             pair.mutable_data_ptr<int64_t>() + 2 * merge_at[s],
                             static_cast<scalar_t*>(value.mutable_data_ptr()) + merge_at[s],
                             status.mutable_data_ptr<int64_t>() + s * rule::kStatusFields});
        run_space(m);
      }
    });
  };
  if (dtype_of("zip_match", sim[0]) == DType::f64)
    run(static_cast<double*>(nullptr));
  else
    run(static_cast<float*>(nullptr));
  return {group, pair, value, status};
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("zip_match", TORCH_BOX(&zipfast::zip_match_cpu)); }
