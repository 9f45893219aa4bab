// SPDX-License-Identifier: Apache-2.0
// correlate on the CPU: co-moments of many spaces become correlations (Stoica et al. 2024, section 4.1).
//
// Work is cut into tiles of 64 x 64 of the upper triangles.  A tile is read once, row by row in vectors, and its
// results, kept in the first cache, are written as they are and turned: no further matrix, no second pass.
#include <algorithm>

#include "cpu/simd.h"
#include "rule.h"
#include "stable.h"

namespace zipfast {
namespace {

constexpr int64_t kTile = 64, kFeatures = 1024;

struct Space {
  const double* comoment;  // [n, n]
  double *mean, *value, *inverse;
  void* out;  // [n, n]
  double share;
  int64_t n;
  bool dead;  // some feature is not alive, and such pairs are asked for
};

// Writes a tile and its mirror; the first pair that is not finite.
template <class scalar_t>
ZF_INLINE int64_t correlate_tile(const Space& s, int64_t row, int64_t column) {
  alignas(64) scalar_t part[kTile * kTile];
  const int64_t last_row = std::min(row + kTile, s.n), last_column = std::min(column + kTile, s.n), n = s.n;
  scalar_t* out = static_cast<scalar_t*>(s.out);
  int64_t bad = rule::kAllFinite;
  for (int64_t i = row; i < last_row; ++i) {
    const int64_t first = std::max(column, i + 1);  // on the diagonal: what lies below it is not defined
    const double *given = s.comoment + i * n, *mean = s.mean, *inverse = s.inverse;
    const double share = s.share, mean_i = mean[i], inverse_i = inverse[i];
    scalar_t* own = part + (i - row) * kTile - column;
    // Runs of 512 bytes are too short for the processor to see them coming: ask for the tile to the right.
    for (int64_t ahead = column + kTile; ahead < column + 2 * kTile; ahead += 8)
      __builtin_prefetch(given + ahead, 0, 2);
    int64_t wrong = 0;
#pragma omp simd reduction(| : wrong)
    for (int64_t j = first; j < last_column; ++j) {
      const double x =
          rule::correlation(rule::raw_correlation(given[j], share, mean_i, mean[j], inverse_i, inverse[j]));
      own[j] = scalar_t(x);
      wrong |= int64_t(x != x);
    }
    if (wrong && bad == rule::kAllFinite)
      bad = i * n + (std::find_if(own + first, own + last_column, [](scalar_t x) { return !(x == x); }) - own);
    if (s.dead && inverse_i == 0)
      for (int64_t j = first; j < last_column; ++j)
        if (inverse[j] == 0 && own[j] == own[j] && rule::same_constant(s.value[i], s.value[j])) own[j] = 1;
    if (first < last_column) std::copy(own + first, own + last_column, out + i * n + first);
  }
  for (int64_t j = column; j < last_column; ++j) {
    const scalar_t* own = part + (j - column);
    scalar_t* turned = out + j * n;
    if (j + 4 < last_column)
      for (int64_t ahead = 0; ahead < kTile; ahead += 16) __builtin_prefetch(turned + 4 * n + row + ahead, 1, 2);
    for (int64_t i = row, last = std::min(last_row, j); i < last; ++i) turned[i] = own[(i - row) * kTile];
  }
  return bad;
}

ZF_MULTIVERSION int64_t run_single(const Space& s, int64_t row, int64_t column) {
  return correlate_tile<float>(s, row, column);
}
ZF_MULTIVERSION int64_t run_double(const Space& s, int64_t row, int64_t column) {
  return correlate_tile<double>(s, row, column);
}

// Means, deviations and the diagonal of the result; notes what they tell.
template <class scalar_t>
void correlate_features(Space& s, const double* total, const double* shift, int64_t* status) {
  scalar_t* out = static_cast<scalar_t*>(s.out);
  torch::stable::parallel_for(0, s.n, kFeatures, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const rule::Spread f = rule::spread(s.comoment[i * (s.n + 1)], total[i], shift[i], s.share);
      s.mean[i] = f.mean, s.value[i] = f.value, s.inverse[i] = f.inverse;
      out[i * (s.n + 1)] = f.finite ? scalar_t(f.inverse > 0) : scalar_t(NAN);
    }
  });
  status[rule::kFeatureAt] = status[rule::kPairAt] = rule::kAllFinite;
  for (int64_t i = s.n - 1; i >= 0; --i)
    if (!(out[i * (s.n + 1)] == out[i * (s.n + 1)])) status[rule::kFeatureAt] = i;
  status[rule::kAliveCount] = std::count_if(s.inverse, s.inverse + s.n, [](double x) { return x > 0; });
}

std::tuple<std::vector<Tensor>, Tensor> correlate_cpu(const std::vector<Tensor>& comoment,
                                                      const std::vector<Tensor>& total,
                                                      const std::vector<Tensor>& shift,
                                                      const std::vector<int64_t>& count, bool wide, bool pair_dead) {
  const size_t spaces = comoment.size();
  STD_TORCH_CHECK(spaces > 0 && total.size() == spaces && shift.size() == spaces && count.size() == spaces,
                  "correlate: malformed lists");
  using torch::stable::new_empty;
  std::vector<Tensor> found;
  Tensor status = new_empty(comoment[0], {int64_t(spaces), int64_t(rule::kCorrelateFields)}, ScalarType::Long);
  int64_t* note = status.mutable_data_ptr<int64_t>();
  int64_t features = 0;
  for (const Tensor& t : total) features += t.numel();
  std::vector<double> scratch(size_t(3 * features));
  std::vector<Tensor> keep;
  std::vector<Space> space(spaces);
  std::vector<std::pair<int32_t, int32_t>> tile;  // of a space
  double* own = scratch.data();
  for (size_t i = 0; i < spaces; ++i, note += rule::kCorrelateFields) {
    const int64_t n = total[i].numel();
    STD_TORCH_CHECK(comoment[i].dim() == 2 && comoment[i].size(0) == n && comoment[i].size(1) == n &&
                        shift[i].numel() == n && count[i] > 0 && n < (1 << 21),
                    "correlate: malformed space");
    found.push_back(new_empty(comoment[i], {n, n}, wide ? ScalarType::Double : ScalarType::Float));
    for (const Tensor* t : {&comoment[i], &total[i], &shift[i]}) keep.push_back(as_contiguous(*t));
    const double *sums = keep[3 * i + 1].const_data_ptr<double>(), *shifts = keep[3 * i + 2].const_data_ptr<double>();
    Space& s = space[i];
    s = {keep[3 * i].const_data_ptr<double>(),
         own,
         own + n,
         own + 2 * n,
         found[i].mutable_data_ptr(),
         1 / double(count[i]),
         n,
         false};
    own += 3 * n;
    (wide ? correlate_features<double> : correlate_features<float>)(s, sums, shifts, note);
    s.dead = pair_dead && note[rule::kAliveCount] < n;
    const int64_t tiles = rule::triangle_tiles((n + kTile - 1) / kTile);
    for (int64_t t = 0; t < tiles; ++t) tile.emplace_back(int32_t(i), int32_t(t));
  }
  std::vector<int64_t> bad(tile.size());
  torch::stable::parallel_for(0, int64_t(tile.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Space& s = space[size_t(tile[size_t(t)].first)];
      int row, column;
      rule::triangle_tile(int((s.n + kTile - 1) / kTile), tile[size_t(t)].second, &row, &column);
      bad[size_t(t)] = (wide ? run_double : run_single)(s, row * kTile, column * kTile);
    }
  });
  note = status.mutable_data_ptr<int64_t>();
  for (size_t t = 0; t < tile.size(); ++t) {
    int64_t& place = note[tile[t].first * rule::kCorrelateFields + rule::kPairAt];
    place = std::min(place, bad[t]);
  }
  return {std::move(found), status};
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("correlate", TORCH_BOX(&zipfast::correlate_cpu)); }
