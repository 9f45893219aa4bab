// SPDX-License-Identifier: Apache-2.0
// gram on the CPU: for each tensor the k x k inner products of x_a - base (angles of task vectors, Wortsman et al.
// 2022).
//
// Work is cut into pieces of kPiece elements of one tensor.  A piece's differences are formed once, rounded to float32
// (float64 where an input is) and widened into a block [k, kBlock] of float64 that stays in cache; its upper triangle
// of products is summed in tiles of 2 x 4 rows, kLanes partial sums each.  Pieces are added in order: the result
// depends on shapes alone.
#include <cstring>
#include <string>

#include "cpu/simd.h"
#include "stable.h"

namespace zipfast {
namespace {

constexpr int64_t kPiece = 65536, kBlock = 128;
constexpr int kLanes = 8;
typedef double vec __attribute__((vector_size(kLanes * sizeof(double))));

struct Side {
  const void* data;  // null: zeros
  DType dtype;
};
struct Group {
  const Side* x;  // [models]
  Side base;
  int64_t models, size;
  bool wide;
};

template <class scalar_t, class acc_t>
ZF_INLINE void load(const void* x, int64_t at, double* row, int64_t n) {
  const scalar_t* own = static_cast<const scalar_t*>(x) + at;
  for (int64_t e = 0; e < n; ++e) row[e] = double(acc_t(widen(own[e])));
}
template <class scalar_t, class acc_t>
ZF_INLINE void subtract(const void* x, int64_t at, double* row, int64_t n) {
  const scalar_t* own = static_cast<const scalar_t*>(x) + at;
  for (int64_t e = 0; e < n; ++e) row[e] = double(acc_t(acc_t(row[e]) - acc_t(widen(own[e]))));
}

// x - base, n elements from `at` on, padded with zeros to kBlock.
template <class acc_t>
ZF_INLINE void difference(Side x, Side base, int64_t at, double* row, int64_t n) {
  switch (x.dtype) {
    case DType::f64:
      load<double, acc_t>(x.data, at, row, n);
      break;
    case DType::f16:
      load<Half, acc_t>(x.data, at, row, n);
      break;
    case DType::bf16:
      load<BFloat16, acc_t>(x.data, at, row, n);
      break;
    default:
      load<float, acc_t>(x.data, at, row, n);
  }
  if (base.data) switch (base.dtype) {
      case DType::f64:
        subtract<double, acc_t>(base.data, at, row, n);
        break;
      case DType::f16:
        subtract<Half, acc_t>(base.data, at, row, n);
        break;
      case DType::bf16:
        subtract<BFloat16, acc_t>(base.data, at, row, n);
        break;
      default:
        subtract<float, acc_t>(base.data, at, row, n);
    }
  for (int64_t e = n; e < kBlock; ++e) row[e] = 0;
}

ZF_INLINE double folded(vec v) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += v[l];
  return sum;
}

// sum[a, b] += <row a, row b> for a in [a, a + kRows), b in [b, b + kColumns): each row of the tile is read once.
template <int kRows, int kColumns>
ZF_INLINE void tile(const double* rows, int64_t a, int64_t b, int64_t models, double* sum) {
  vec acc[kRows][kColumns] = {};
  for (int64_t e = 0; e < kBlock; e += kLanes) {
    vec left[kRows];
    for (int i = 0; i < kRows; ++i) memcpy(&left[i], rows + (a + i) * kBlock + e, sizeof(vec));
    for (int j = 0; j < kColumns; ++j) {
      vec right;
      memcpy(&right, rows + (b + j) * kBlock + e, sizeof right);
      for (int i = 0; i < kRows; ++i) acc[i][j] += left[i] * right;
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sum[(a + i) * models + b + j] += folded(acc[i][j]);
}

ZF_INLINE void gram_piece(const Group& g, int64_t begin, int64_t end, double* rows, double* sum) {
  constexpr int kRows = 2, kColumns = 4;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    for (int64_t i = 0; i < g.models; ++i) {
      if (g.wide)
        difference<double>(g.x[i], g.base, at, rows + i * kBlock, n);
      else
        difference<float>(g.x[i], g.base, at, rows + i * kBlock, n);
    }
    for (int64_t a = 0; a < g.models; a += kRows) {
      const int64_t high = std::min<int64_t>(kRows, g.models - a);
      int64_t b = a;
      if (high == kRows)
        for (; b + kColumns <= g.models; b += kColumns) tile<kRows, kColumns>(rows, a, b, g.models, sum);
      for (int64_t i = a; i < a + high; ++i)
        for (int64_t j = b; j < g.models; ++j) tile<1, 1>(rows, i, j, g.models, sum);
    }
  }
}

ZF_MULTIVERSION void run_piece(const Group& g, int64_t begin, int64_t end, double* rows, double* sum) {
  gram_piece(g, begin, end, rows, sum);
}

Tensor gram_cpu(const std::vector<Tensor>& x, int64_t models, const std::vector<Tensor>& base, std::string) {
  STD_TORCH_CHECK(models > 0 && !x.empty() && int64_t(x.size()) % models == 0, "gram: malformed lists");
  const int64_t count = int64_t(x.size()) / models;
  STD_TORCH_CHECK(base.empty() || int64_t(base.size()) == count, "gram: malformed 'base'");
  std::vector<Tensor> keep;
  auto side = [&](const Tensor& t, const Tensor& like) {
    STD_TORCH_CHECK(t.numel() == like.numel(), "gram: malformed tensors");
    keep.push_back(as_contiguous(t));
    return Side{keep.back().const_data_ptr(), dtype_of("gram", t)};
  };
  std::vector<Side> sides(x.size());  // [count, models]
  std::vector<Group> group;
  std::vector<std::pair<int64_t, int64_t>> piece;  // tensor, first element
  for (int64_t j = 0; j < count; ++j) {
    const Side from = base.empty() ? Side{nullptr, DType::f32} : side(base[j], x[j]);
    bool wide = from.dtype == DType::f64;
    for (int64_t i = 0; i < models; ++i) {
      sides[j * models + i] = side(x[i * count + j], x[j]);
      wide |= sides[j * models + i].dtype == DType::f64;
    }
    group.push_back({sides.data() + j * models, from, models, x[j].numel(), wide});
    for (int64_t at = 0; at < x[j].numel(); at += kPiece) piece.emplace_back(j, at);
  }
  const size_t square = size_t(models * models);
  std::vector<double> part(piece.size() * square, 0.);
  torch::stable::parallel_for(0, int64_t(piece.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> rows(size_t(models * kBlock));
    for (int64_t p = begin; p < end; ++p) {
      const auto [j, at] = piece[size_t(p)];
      const Group& g = group[size_t(j)];
      run_piece(g, at, std::min(at + kPiece, g.size), rows.data(), part.data() + size_t(p) * square);
    }
  });
  Tensor out = torch::stable::new_empty(x[0], {count, models, models}, ScalarType::Double);
  double* sum = out.mutable_data_ptr<double>();
  std::fill(sum, sum + size_t(count) * square, 0.);
  for (size_t p = 0; p < piece.size(); ++p) {
    double* own = sum + size_t(piece[p].first) * square;
    for (size_t e = 0; e < square; ++e) own[e] += part[p * square + e];
  }
  for (int64_t j = 0; j < count; ++j)
    for (int64_t a = 0; a < models; ++a)
      for (int64_t b = 0; b < a; ++b) sum[(j * models + a) * models + b] = sum[(j * models + b) * models + a];
  return out;
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("gram", TORCH_BOX(&zipfast::gram_cpu)); }
