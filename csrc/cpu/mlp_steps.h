// SPDX-License-Identifier: Apache-2.0
// The layers of `mlp_steps_` on the CPU: forward, gradient of the input, gradient of the weights with the step.
//
// Activations lie transposed, in panels of W = V * kLanes samples: [panel][features][W], so that one weight meets a
// whole panel with V multiply-adds and no two samples are ever added.  A sparse layer holds its survivors alone, in
// tiles of columns whose activations fit into the first cache, row after row inside a tile; a second index by column
// serves the gradient of the input.  Dense layers use the tensors in place, four rows at a time, and take the gradient
// of their weights from rows of samples [sample][features], which spares the sums across lanes.
//
// Every output has one owner, and its sum one order: what is computed does not depend on who computes it.  Vectors are
// GCC's vector extension, compiled for AVX-512, AVX2 and the baseline through ZF_MULTIVERSION (mlp_steps.cpp).
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/panel.h"
#include "cpu/simd.h"

namespace zipfast::cpu {

constexpr int kRowsAtOnce = 4;

template <class T>
struct Wide {
  static constexpr int kLanes = 64 / int(sizeof(T));
  typedef T vec __attribute__((vector_size(64), may_alias));
  typedef T loose __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
};

template <class T>
ZF_INLINE typename Wide<T>::vec load(const T* p) {
  return *reinterpret_cast<const typename Wide<T>::vec*>(p);
}
template <class T>
ZF_INLINE void store(T* p, typename Wide<T>::vec v) {
  *reinterpret_cast<typename Wide<T>::vec*>(p) = v;
}

// --- one step of a parameter ----------------------------------------------------------------------------------------

enum class MlpRule { sgd, adam, adamw };

template <class T>
struct MlpUpdate {  // the constants of one iteration
  MlpRule rule;
  bool momentum, nesterov;
  T beta1, beta2, eps, decay;
  T rate, shrink, root;  // lr over its correction; 1 - lr * decay; 1 / sqrt of the other correction
};

// n parameters with their gradients, as torch.optim defines the rules.  `keep` (0 or 1) where some are dead: their sums
// are formed too, and dropped, so that even a NaN leaves exactly 0.
template <class T>
ZF_INLINE void mlp_update(const MlpUpdate<T>& u, const T* gradient, const int8_t* keep, T* w, T* first, T* second,
                          int64_t n) {
  if (u.rule == MlpRule::sgd) {
    if (!u.momentum) {
#pragma omp simd
      for (int64_t e = 0; e < n; ++e) w[e] -= u.rate * (gradient[e] + u.decay * w[e]);
    } else {
#pragma omp simd
      for (int64_t e = 0; e < n; ++e) {
        const T g = gradient[e] + u.decay * w[e], buffer = u.beta1 * first[e] + g;
        first[e] = buffer;
        w[e] -= u.rate * (u.nesterov ? g + u.beta1 * buffer : buffer);
      }
    }
  } else {
    const T decay = u.rule == MlpRule::adam ? u.decay : T(0), shrink = u.rule == MlpRule::adam ? T(1) : u.shrink;
#pragma omp simd
    for (int64_t e = 0; e < n; ++e) {
      const T g = gradient[e] + decay * w[e], m = first[e] + (1 - u.beta1) * (g - first[e]),
              v = u.beta2 * second[e] + (1 - u.beta2) * (g * g);
      first[e] = m;
      second[e] = v;
      w[e] = w[e] * shrink - u.rate * m / (std::sqrt(v) * u.root + u.eps);
    }
  }
  if (!keep) return;
  for (T* p : {w, first, second})
    if (p) {
#pragma omp simd
      for (int64_t e = 0; e < n; ++e) p[e] = keep[e] ? p[e] : T(0);
    }
}

// --- sums across lanes ----------------------------------------------------------------------------------------------

// The four sums over lanes of four vectors.
ZF_INLINE void sum_lanes(Wide<float>::vec a, Wide<float>::vec b, Wide<float>::vec c, Wide<float>::vec d, float* out) {
#define ZF_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define ZF_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
  const auto ab = __builtin_shufflevector(a, b, ZF_LOW) + __builtin_shufflevector(a, b, ZF_HIGH);
  const auto cd = __builtin_shufflevector(c, d, ZF_LOW) + __builtin_shufflevector(c, d, ZF_HIGH);
#undef ZF_LOW
#undef ZF_HIGH
  const auto all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const auto half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto sum = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  std::memcpy(out, &sum, 4 * sizeof(float));
}
ZF_INLINE void sum_lanes(Wide<double>::vec a, Wide<double>::vec b, Wide<double>::vec c, Wide<double>::vec d,
                         double* out) {
  const auto ab = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
                  __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  const auto cd = __builtin_shufflevector(c, d, 0, 8, 2, 10, 4, 12, 6, 14) +
                  __builtin_shufflevector(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
  const auto all = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  const auto sum = __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
  std::memcpy(out, &sum, 4 * sizeof(double));
}

// dst[c * to + r] = src[r * from + c] for [rows, columns]; whole blocks by a perfect-shuffle network.
template <class T>
ZF_INLINE void flip(const T* const* src, int64_t rows, int64_t columns, T* dst, int64_t to) {
  using vec = typename Wide<T>::vec;
  using loose = typename Wide<T>::loose;
  constexpr int L = Wide<T>::kLanes, H = L / 2;
  for (int64_t r = 0; r < rows; r += L) {
    int64_t c = 0;
    for (; r + L <= rows && c + L <= columns; c += L) {
      vec a[L], b[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) a[i] = *reinterpret_cast<const loose*>(src[r + i] + c);
#pragma GCC unroll 4
      for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < H; ++i) {
          if constexpr (L == 16) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + H], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] =
                __builtin_shufflevector(a[i], a[i + H], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
          } else {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + H], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + H], 4, 12, 5, 13, 6, 14, 7, 15);
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) *reinterpret_cast<loose*>(dst + (c + i) * to + r) = a[i];
    }
    for (; c < columns; ++c)
      for (int64_t i = r; i < std::min<int64_t>(r + L, rows); ++i) dst[c * to + i] = src[i][c];
  }
}

// --- a layer --------------------------------------------------------------------------------------------------------

template <class T>
struct MlpLayer {
  int64_t out, in;
  T *w, *w1, *w2;                // [out, in], or the survivors; states, null where the rule has none
  T *bias, *b1, *b2;             // [out]
  const int8_t* keep = nullptr;  // dense with dead weights: [out, in], 0 or 1
  bool sparse = false, relu = false;
  int64_t tiles = 1;
  std::vector<uint32_t> row;        // [tiles * out + 1], first survivor of a tile's row
  std::vector<uint16_t> column;     // of each survivor
  std::vector<uint32_t> by_column;  // [in + 1]; the same again by column, where the input wants a gradient
  std::vector<uint16_t> owner;      // its row
  std::vector<uint32_t> place;      // where its weight is
  T* gradient = nullptr;            // sparse: of the survivors
  T *x, *d;                         // [panel][in][W] and [panel][out][W]: input, gradient of the output
  T* y;                             // output: the input of the next layer, or the logits
  T* dx;                            // gradient of the input; null for the first layer
  T* sample;                        // dense: the input again as [sample][padded]
  int64_t padded;
  int64_t pieces_of_rows, pieces_of_columns;  // cuts of the work, by shape alone
};

ZF_INLINE int64_t cut(int64_t n, int64_t pieces, int64_t piece) {  // where a piece begins: multiples of four
  return std::min(n, ((n + pieces - 1) / pieces + 3) / 4 * 4 * piece);
}

// y = w x + bias, and ReLU, which keeps NaN.
template <int V, class T>
ZF_INLINE void finish_row(const MlpLayer<T>& f, typename Wide<T>::vec* acc, T* y) {
  for (int v = 0; v < V; ++v)
    store(y + v * Wide<T>::kLanes, f.relu ? (acc[v] < 0 ? typename Wide<T>::vec{} : acc[v]) : acc[v]);
}

template <int V, class T>
ZF_INLINE void sparse_forward(const MlpLayer<T>& f, const T* x, T* y, int64_t begin, int64_t end) {
  using vec = typename Wide<T>::vec;
  constexpr int L = Wide<T>::kLanes, W = V * L;
  for (int64_t t = 0; t < f.tiles; ++t)
    for (int64_t r = begin; r < end; ++r) {
      vec acc[V], more[V];
      T* target = y + r * W;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[v] = t ? load(target + v * L) : vec{} + f.bias[r];
        more[v] = vec{};
      }
      const uint32_t last = f.row[size_t(t * f.out + r + 1)];
      uint32_t i = f.row[size_t(t * f.out + r)];
      for (; i + 2 <= last; i += 2) {  // two sums, so that none waits for the one before
        const T *s = x + f.column[i] * W, *q = x + f.column[i + 1] * W;
        const vec a = vec{} + f.w[i], b = vec{} + f.w[i + 1];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[v] += a * load(s + v * L), more[v] += b * load(q + v * L);
      }
      if (i < last) {
        const vec a = vec{} + f.w[i];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[v] += a * load(x + f.column[i] * W + v * L);
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[v] += more[v];
      if (t + 1 == f.tiles)
        finish_row<V>(f, acc, target);
      else
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(target + v * L, acc[v]);
    }
}

template <int V, int R, class T>
ZF_INLINE void dense_forward_rows(const MlpLayer<T>& f, const T* x, T* y, int64_t r) {
  using vec = typename Wide<T>::vec;
  constexpr int L = Wide<T>::kLanes, W = V * L;
  vec acc[R][V];
#pragma GCC unroll 4
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[q][v] = vec{} + f.bias[r + q];
  const T* w = f.w + r * f.in;
  for (int64_t c = 0; c < f.in; ++c) {
    vec s[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[v] = load(x + c * W + v * L);
#pragma GCC unroll 4
    for (int q = 0; q < R; ++q) {
      const vec a = vec{} + w[q * f.in + c];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[q][v] += a * s[v];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < R; ++q) finish_row<V>(f, acc[q], y + (r + q) * W);
}

template <int V, class T>
ZF_INLINE void forward(const MlpLayer<T>& f, int64_t panels, int64_t begin, int64_t end) {
  constexpr int W = V * Wide<T>::kLanes;
  for (int64_t p = 0; p < panels; ++p) {
    const T* x = f.x + p * f.in * W;
    T* y = f.y + p * f.out * W;
    if (f.sparse) {
      sparse_forward<V>(f, x, y, begin, end);
      continue;
    }
    int64_t r = begin;
    for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) dense_forward_rows<V, kRowsAtOnce>(f, x, y, r);
    for (; r < end; ++r) dense_forward_rows<V, 1>(f, x, y, r);
  }
}

// dx = w^T d where the input is above 0 (or NaN), for R columns.
template <int V, int R, class T>
ZF_INLINE void input_gradient_columns(const MlpLayer<T>& f, const T* d, const T* x, T* dx, int64_t c) {
  using vec = typename Wide<T>::vec;
  constexpr int L = Wide<T>::kLanes, W = V * L;
  vec acc[R][V] = {};
  if (f.sparse) {
    static_assert(R == 1 || R == kRowsAtOnce);
    for (uint32_t i = f.by_column[size_t(c)]; i < f.by_column[size_t(c + 1)]; ++i) {
      const vec a = vec{} + f.w[f.place[i]];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[0][v] += a * load(d + f.owner[i] * W + v * L);
    }
  } else {
    for (int64_t r = 0; r < f.out; ++r) {
      vec s[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) s[v] = load(d + r * W + v * L);
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q) {
        const vec a = vec{} + f.w[r * f.in + c + q];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[q][v] += a * s[v];
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (c + q) * W + v * L;
      store(dx + at, load(x + at) <= 0 ? vec{} : acc[q][v]);
    }
}

template <int V, class T>
ZF_INLINE void input_gradient(const MlpLayer<T>& f, int64_t panels, int64_t begin, int64_t end) {
  constexpr int W = V * Wide<T>::kLanes;
  for (int64_t p = 0; p < panels; ++p) {
    const T *d = f.d + p * f.out * W, *x = f.x + p * f.in * W;
    T* dx = f.dx + p * f.in * W;
    int64_t c = begin;
    if (!f.sparse)
      for (; c + kRowsAtOnce <= end; c += kRowsAtOnce) input_gradient_columns<V, kRowsAtOnce>(f, d, x, dx, c);
    for (; c < end; ++c) input_gradient_columns<V, 1>(f, d, x, dx, c);
  }
}

// Gradients of the survivors of a tile's rows: products of a row of d with a row of x, summed over the samples.
template <int V, class T>
ZF_INLINE void sparse_gradient(const MlpLayer<T>& f, int64_t panels, int64_t t, int64_t begin, int64_t end) {
  using vec = typename Wide<T>::vec;
  constexpr int L = Wide<T>::kLanes, W = V * L;
  for (int64_t p = 0; p < panels; ++p) {
    const T* x = f.x + p * f.in * W;
    for (int64_t r = begin; r < end; ++r) {
      vec d[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) d[v] = load(f.d + (p * f.out + r) * W + v * L);
      const uint32_t last = f.row[size_t(t * f.out + r + 1)];
      for (uint32_t i = f.row[size_t(t * f.out + r)]; i < last; i += 4) {
        const uint32_t most = std::min<uint32_t>(4, last - i);
        vec sum[4];
#pragma GCC unroll 4
        for (uint32_t k = 0; k < 4; ++k) {
          const T* s = x + f.column[i + k] * W;  // padded with 3 columns, whose sums are dropped
          sum[k] = d[0] * load(s);
#pragma GCC unroll 4
          for (int v = 1; v < V; ++v) sum[k] += d[v] * load(s + v * L);
        }
        T four[4];
        sum_lanes(sum[0], sum[1], sum[2], sum[3], four);
        for (uint32_t k = 0; k < most; ++k) f.gradient[i + k] = p ? f.gradient[i + k] + four[k] : four[k];
      }
    }
  }
}

// Gradients of R rows x C vectors of columns, from rows of samples, and their step.
template <int V, int R, class T>
ZF_INLINE void dense_step_block(const MlpLayer<T>& f, const MlpUpdate<T>& u, int64_t samples, int64_t r, int64_t c) {
  using vec = typename Wide<T>::vec;
  constexpr int L = Wide<T>::kLanes, W = V * L, C = 4;
  vec acc[R][C] = {};
  for (int64_t j0 = 0; j0 < samples; j0 += W) {
    const T *d = f.d + (j0 * f.out + r * W), *x = f.sample + j0 * f.padded + c;
    const int64_t n = std::min<int64_t>(W, samples - j0);
    for (int64_t j = 0; j < n; ++j) {
      vec s[C];
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) s[v] = load(x + j * f.padded + v * L);
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q) {
        const vec a = vec{} + d[q * W + j];
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) acc[q][v] += a * s[v];
      }
    }
  }
  const int64_t n = std::min<int64_t>(C * L, f.in - c);
  for (int q = 0; q < R; ++q) {
    alignas(64) T g[C * L];
#pragma GCC unroll 4
    for (int v = 0; v < C; ++v) store(g + v * L, acc[q][v]);
    const int64_t at = (r + q) * f.in + c;
    mlp_update(u, g, f.keep ? f.keep + at : nullptr, f.w + at, f.w1 ? f.w1 + at : nullptr, f.w2 ? f.w2 + at : nullptr,
               n);
  }
}

template <int V, class T>
ZF_INLINE void step(const MlpLayer<T>& f, const MlpUpdate<T>& u, int64_t samples, int64_t panels, int64_t begin,
                    int64_t end) {
  using vec = typename Wide<T>::vec;
  constexpr int L = Wide<T>::kLanes, W = V * L, C = 4;
  if (f.sparse) {
    for (int64_t t = 0; t < f.tiles; ++t) {
      sparse_gradient<V>(f, panels, t, begin, end);
      const int64_t at = f.row[size_t(t * f.out + begin)], last = f.row[size_t(t * f.out + end)];
      mlp_update(u, f.gradient + at, nullptr, f.w + at, f.w1 ? f.w1 + at : nullptr, f.w2 ? f.w2 + at : nullptr,
                 last - at);
    }
  } else {
    for (int64_t c = 0; c < f.in; c += C * L) {  // the samples' columns stay in the first cache while all rows pass
      int64_t r = begin;
      for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) dense_step_block<V, kRowsAtOnce>(f, u, samples, r, c);
      for (; r < end; ++r) dense_step_block<V, 1>(f, u, samples, r, c);
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    vec sum = {};
    for (int64_t p = 0; p < panels; ++p)
      for (int v = 0; v < V; ++v) sum += load(f.d + (p * f.out + r) * W + v * L);
    T four[4];
    sum_lanes(sum, vec{}, vec{}, vec{}, four);
    mlp_update(u, four, nullptr, f.bias + r, f.b1 ? f.b1 + r : nullptr, f.b2 ? f.b2 + r : nullptr, 1);
  }
}

}  // namespace zipfast::cpu
