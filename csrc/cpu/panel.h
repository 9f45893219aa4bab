// SPDX-License-Identifier: Apache-2.0
// Packed panels and their symmetric products: the inner half of `moments` on the CPU.
//
// A panel holds up to kMaxPanel samples of all F stacked features, shifted and widened, as slivers of P features:
// sliver j is [samples][P] with P = kVectors * kLanes.  One product adds panel * panel^T to the upper triangle of a
// float64 matrix: tiles of kRows x P are formed in registers (float32 for float32 and half inputs) over kFlush samples,
// then added in float64.
//
// Everything here is ZF_INLINE and compiled three times, into functions for AVX-512, AVX2 and the baseline
// (moments.cpp), as the best tile differs.  Vectors are GCC's vector extension: no intrinsics, so other processors work
// too.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/simd.h"
#include "dtype.h"

namespace zipfast::cpu {

constexpr int64_t kMaxPanel = 1024;  // samples packed at a time
constexpr int64_t kFlush = 256;      // products summed in registers, in float32, before the float64 sum takes over

// Features of one space as they lie in memory: M tensors [outer, size, inner], stacked to F = M * size rows.
struct Source {
  const void* const* x;
  const double* shift;  // [F]
  int64_t models, size, outer, inner;
  int64_t features() const { return models * size; }
};

// The samples of a panel: whole slices of `outer`, or a piece of `inner` of one slice.
struct Range {
  int64_t outer0, outer1, inner0, inner1;
  int64_t samples() const { return (outer1 - outer0) * (inner1 - inner0); }
};

template <class T>
struct AlignedDelete {
  void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete<T>>;
template <class T>
Buffer<T> buffer(int64_t n) {
  return Buffer<T>(static_cast<T*>(::operator new[](sizeof(T) * size_t(n), std::align_val_t(64))));
}

template <class acc_t_, int kLanes_, int kVectors_, int kRows_>
struct Shape {
  using acc_t = acc_t_;
  static constexpr int kLanes = kLanes_, kVectors = kVectors_, kRows = kRows_, kSliver = kLanes * kVectors;
  static_assert(kSliver % kRows == 0);
  typedef acc_t vec __attribute__((vector_size(sizeof(acc_t) * kLanes_)));
  typedef acc_t loose __attribute__((vector_size(sizeof(acc_t) * kLanes_), aligned(sizeof(acc_t))));
  static ZF_INLINE int64_t slivers(int64_t features) { return (features + kSliver - 1) / kSliver; }
};

// kLanes rows -> columns: dst[k * stride + r] = row[r][at + k] - shift[r] for kLanes samples; adds each row's sum to
// sums[r]: kLanes terms in the working type, then float64, as means must be better than what is subtracted from them.
// A perfect-shuffle network: log2(kLanes) rounds of interleaving rows i and i + kLanes / 2.
template <class S>
ZF_INLINE void transpose_block(const typename S::acc_t* const* row, int64_t at, const typename S::vec& shift,
                               typename S::acc_t* dst, int64_t stride, double* sums) {
  using vec = typename S::vec;
  using loose = typename S::loose;
  constexpr int L = S::kLanes, H = L / 2;
  vec a[L], b[L];
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) a[r] = *reinterpret_cast<const loose*>(row[r] + at);
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) {
      if constexpr (L == 16) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + H], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        b[2 * i + 1] =
            __builtin_shufflevector(a[i], a[i + H], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      } else if constexpr (L == 8) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + H], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + H], 4, 12, 5, 13, 6, 14, 7, 15);
      } else if constexpr (L == 4) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + H], 0, 4, 1, 5);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + H], 2, 6, 3, 7);
      } else {
        static_assert(L == 2);
        b[2 * i] = __builtin_shufflevector(a[i], a[i + H], 0, 2);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + H], 1, 3);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) a[r] = b[r];
  }
  vec total = {};
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) {
    a[r] -= shift;
    *reinterpret_cast<vec*>(dst + r * stride) = a[r];
    total += a[r];
  }
  typename S::acc_t lane[L];
  std::memcpy(lane, &total, sizeof lane);
#pragma omp simd
  for (int r = 0; r < L; ++r) sums[r] += lane[r];
}

// One feature's samples of a range, widened, contiguous.
template <class scalar_t, class acc_t>
ZF_INLINE void copy_row(const scalar_t* x, int64_t slice, int64_t n_outer, int64_t n_inner, acc_t* out) {
  for (int64_t o = 0; o < n_outer; ++o) {
    const scalar_t* p = x + o * slice;
    acc_t* q = out + o * n_inner;
#pragma omp simd
    for (int64_t k = 0; k < n_inner; ++k) q[k] = widen(p[k]);
  }
}

// Packs sliver j of a range; sums[kSliver] receives the sums of its features over the range.  `rows` is scratch of
// kLanes * kMaxPanel.
template <class S, class scalar_t>
ZF_INLINE void pack_sliver(const Source& src, const Range& range, int64_t j, typename S::acc_t* sliver,
                           typename S::acc_t* rows, double* sums) {
  using acc_t = typename S::acc_t;
  using vec = typename S::vec;
  constexpr int P = S::kSliver, L = S::kLanes;
  const int64_t F = src.features(), K = range.samples(), n_outer = range.outer1 - range.outer0,
                n_inner = range.inner1 - range.inner0;
  const auto* const* x = reinterpret_cast<const scalar_t* const*>(src.x);
  for (int c = 0; c < P; ++c) sums[c] = 0;
  if (src.inner == 1) {  // tokens: features lie side by side already
    for (int64_t c0 = 0; c0 < P;) {
      const int64_t f = j * P + c0;
      if (f >= F) {
        for (int64_t k = 0; k < K; ++k)
          for (int64_t c = c0; c < P; ++c) sliver[k * P + c] = 0;
        break;
      }
      const int64_t m = f / src.size, d = f % src.size, width = std::min(P - c0, src.size - d);
      acc_t shift[P];
      for (int64_t c = 0; c < width; ++c) shift[c] = acc_t(src.shift[f + c]);
      for (int64_t k0 = 0; k0 < K; k0 += L) {
        const int64_t k1 = std::min<int64_t>(K, k0 + L);
        acc_t total[P] = {};
        for (int64_t k = k0; k < k1; ++k) {
          const scalar_t* p = x[m] + (range.outer0 + k) * src.size + d;
          acc_t* q = sliver + k * P + c0;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) {
            q[c] = acc_t(widen(p[c])) - shift[c];
            total[c] += q[c];
          }
        }
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) sums[c0 + c] += total[c];
      }
      c0 += width;
    }
    return;
  }
  const int64_t slice = src.size * src.inner, ld = (K + L - 1) / L * L;
  for (int v = 0; v < S::kVectors; ++v) {
    vec shift = {};
    const acc_t* row[L];
    const scalar_t* from[L];
    bool whole = std::is_same_v<scalar_t, acc_t> && n_inner % L == 0;  // rows can be read where they lie
    for (int r = 0; r < L; ++r) {
      const int64_t f = j * P + v * L + r;
      whole = whole && f < F;
      from[r] = f < F ? x[f / src.size] + range.outer0 * slice + (f % src.size) * src.inner + range.inner0 : nullptr;
      if (f < F) shift[r] = acc_t(src.shift[f]);
    }
    acc_t* dst = sliver + v * L;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (whole) {
        for (int64_t o = 0; o < n_outer; ++o) {
          for (int r = 0; r < L; ++r) row[r] = from[r] + o * slice;
          for (int64_t k = 0; k < n_inner; k += L)
            transpose_block<S>(row, k, shift, dst + (o * n_inner + k) * P, P, sums + v * L);
        }
        continue;
      }
    }
    for (int r = 0; r < L; ++r) {
      acc_t* out = rows + r * ld;
      row[r] = out;
      if (from[r])
        copy_row(from[r], slice, n_outer, n_inner, out);
      else
        for (int64_t k = 0; k < K; ++k) out[k] = 0;
      for (int64_t k = K; k < ld; ++k) out[k] = acc_t(shift[r]);  // the last block reaches over the end, by zeros
    }
    for (int64_t k = 0; k < ld; k += L) transpose_block<S>(row, k, shift, dst + k * P, P, sums + v * L);
  }
}

// Distance of two slivers: samples rounded up to whole vectors.
template <class S>
ZF_INLINE int64_t panel_stride(int64_t samples) {
  return (samples + S::kLanes - 1) / S::kLanes * S::kLanes * S::kSliver;
}

// Brings the next panel's lines into cache while the products of this one, which hardly touch memory, run.
struct Fetch {
  const char* const* row = nullptr;  // where each feature's samples start
  int64_t rows = 0, bytes = 0;       // features; bytes of each
  int64_t at = 0, offset = 0;
  ZF_INLINE void some() {
    for (int i = 0; i < 8 && at < rows; ++i) {
      __builtin_prefetch(row[at] + offset);
      offset += 64;
      if (offset >= bytes) offset = 0, ++at;
    }
  }
};

// Adds sum over samples of a[k][0 .. kRows) b[k][0 .. kWide * L) to c (float64, `ldc` apart), clipped to rows x cols.
template <class S, int kWide, int L = S::kLanes>
ZF_INLINE void product_tile(const typename S::acc_t* a, const typename S::acc_t* b, int64_t samples, double* c,
                            int64_t ldc, int64_t rows, int64_t cols, Fetch* fetch) {
  using acc_t = typename S::acc_t;
  typedef acc_t vec __attribute__((vector_size(sizeof(acc_t) * L)));
  constexpr int R = S::kRows, V = kWide, P = S::kSliver;
  // The tile's float64 lines arrive while the products run.
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < cols; k += 8) __builtin_prefetch(c + r * ldc + k, 1);
  double tile[R][V * L] = {};
  for (int64_t k0 = 0; k0 < samples; k0 += kFlush) {
    const int64_t steps = std::min(kFlush, samples - k0);
    vec acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = vec{};
    for (int64_t k = 0; k < steps; ++k, a += P, b += P) {
      if (fetch && k % 16 == 0) fetch->some();
      vec bv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) bv[v] = *reinterpret_cast<const vec*>(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += a[r] * bv[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc_t lane[L];
        std::memcpy(lane, &acc[r][v], sizeof lane);
#pragma omp simd
        for (int l = 0; l < L; ++l) tile[r][v * L + l] += lane[l];
      }
  }
  for (int64_t r = 0; r < rows; ++r) {
    double* out = c + r * ldc;
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k) out[k] += tile[r][k];
  }
}

// Adds slivers [i0, i1) x [j0, j1) of panel * panel^T, upper triangle, to c [F, F].
template <class S>
ZF_INLINE void product_block(const typename S::acc_t* panel, int64_t samples, int64_t features, int64_t i0, int64_t i1,
                             int64_t j0, int64_t j1, double* c, Fetch* fetch) {
  constexpr int R = S::kRows, P = S::kSliver, L = S::kLanes;
  static_assert(S::kVectors == 2 && (L % R == 0 || R == P));
  const int64_t stride = panel_stride<S>(samples);
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t i = i0; i < i1 && i <= j; ++i)
      for (int64_t r = 0; r < P && i * P + r < features; r += R) {
        const int64_t row = i * P + r, n_rows = std::min<int64_t>(R, features - row);
        const auto *a = panel + i * stride + r, *b = panel + j * stride;
        // On the diagonal what lies left of column r is below it: a tile starts there, with half a vector if need be.
        int64_t first = i == j ? r : 0;
        const auto columns = [&](int64_t n) { return std::min<int64_t>(n, features - j * P - first); };
        const auto at = [&] { return c + row * features + j * P + first; };
        if constexpr (2 * R == L) {
          if (first % L) {
            product_tile<S, 1, R>(a, b + first, samples, at(), features, n_rows, columns(R), fetch);
            first += R;
          }
        }
        if (first == 0)
          product_tile<S, 2>(a, b, samples, at(), features, n_rows, columns(P), fetch);
        else if (first < P && columns(L) > 0)
          product_tile<S, 1>(a, b + first, samples, at(), features, n_rows, columns(L), fetch);
      }
}

}  // namespace zipfast::cpu
