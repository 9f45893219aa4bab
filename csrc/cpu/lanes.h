// SPDX-License-Identifier: Apache-2.0
// Batches packed so that samples lie side by side: [columns][lanes], in chunks of as many lanes as a row's sums fit
// registers.  What sparse layers compute on: one weight then meets whole vectors of samples.  And what is done to one
// row of such a layer: its outputs, its share of the input gradient, the gradients of its weights.
//
// Everything here is ZF_INLINE, to be compiled for each instruction set along with its caller (simd.h).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/simd.h"
#include "dtype.h"

namespace zipfast::cpu {

constexpr int64_t kWidest = 256;  // bytes of a chunk's lanes

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;
template <class T>
Buffer<T> buffer(int64_t n) {
  return Buffer<T>(static_cast<T*>(::operator new[](sizeof(T) * size_t(n), std::align_val_t(64))));
}

template <class T, int kBytes>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
};

// Samples [first, first + count), packed at `offset` as [columns][lanes]; the lanes beyond `count` are 0.
struct Chunk {
  int64_t first, count, lanes, offset;
};

// x [batch, columns] -> the columns [begin, end) of a chunk.
template <class scalar_t, class acc_t>
ZF_INLINE void pack_columns(const scalar_t* x, int64_t columns, const Chunk& chunk, acc_t* packed, int64_t begin,
                            int64_t end) {
  constexpr int64_t kLine = 16;  // columns at a time: reads are whole cache lines
  for (int64_t at = begin; at < end; at += kLine) {
    const int64_t n = std::min(kLine, end - at);
    acc_t* to = packed + chunk.offset + at * chunk.lanes;
    for (int64_t s = 0; s < chunk.count; ++s) {
      const scalar_t* from = x + (chunk.first + s) * columns + at;
      for (int64_t k = 0; k < n; ++k) to[k * chunk.lanes + s] = widen(from[k]);
    }
    if (chunk.count == chunk.lanes) continue;
    for (int64_t k = 0; k < n; ++k) std::fill(to + k * chunk.lanes + chunk.count, to + (k + 1) * chunk.lanes, acc_t(0));
  }
}

// Chunks as wide as a row's sums fit registers, the last one no wider than it must be.
inline std::vector<Chunk> chunks_of(int64_t batch, int64_t columns, int64_t size) {
  std::vector<Chunk> chunks;
  int64_t offset = 0;
  for (int64_t at = 0; at < batch;) {
    int64_t lanes = 32 / size;
    while (lanes < batch - at && lanes < kWidest / size) lanes *= 2;
    const int64_t count = std::min(lanes, batch - at);
    chunks.push_back({at, count, lanes, offset});
    at += count, offset += columns * lanes;
  }
  return chunks;
}

// One row times kVectors vectors of samples; kChains sums each, as a sum must not wait for the one before it.
template <int kBytes, int kVectors, int kChains, class scalar_t, class acc_t, class index_t>
ZF_INLINE void row_of_lanes(const acc_t* x, const scalar_t* value, const index_t* column, int64_t i, int64_t end,
                            acc_t* y) {
  using vec = typename Vector<acc_t, kBytes>::type;
  constexpr int64_t kLanes = kVectors * kBytes / int64_t(sizeof(acc_t));
  vec sum[kChains][kVectors] = {};
  for (; i + kChains <= end; i += kChains)
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      const vec* from = reinterpret_cast<const vec*>(x + int64_t(column[i + c]) * kLanes);
      const acc_t weight = widen(value[i + c]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[c][v] += from[v] * weight;
    }
  for (; i < end; ++i) {
    const vec* from = reinterpret_cast<const vec*>(x + int64_t(column[i]) * kLanes);
    const acc_t weight = widen(value[i]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[0][v] += from[v] * weight;
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    vec total = sum[0][v];
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) total += sum[c][v];
    reinterpret_cast<vec*>(y)[v] = total;
  }
}

// One row's weights between two columns, added to a tile: tile [columns][lanes], grad [lanes].
template <int kBytes, int kVectors, class scalar_t, class acc_t, class index_t>
ZF_INLINE void scatter_lanes(const acc_t* grad, const scalar_t* value, const index_t* column, int64_t i, int64_t end,
                             acc_t* tile) {
  using vec = typename Vector<acc_t, kBytes>::type;
  vec own[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) own[v] = reinterpret_cast<const vec*>(grad)[v];
  for (; i < end; ++i) {
    vec* to = reinterpret_cast<vec*>(tile + int64_t(column[i]) * (kVectors * kBytes / int64_t(sizeof(acc_t))));
    const acc_t weight = widen(value[i]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) to[v] += own[v] * weight;
  }
}

// Blocks of kHalf lanes: those of a and b in turn, the lower and the upper halves of their blocks of 2 kHalf added.
template <int kHalf, class vec, int... lane>
ZF_INLINE vec fold(const vec& a, const vec& b, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  return __builtin_shufflevector(a, b, (lane / kHalf % 2 * n + lane / kHalf / 2 * 2 * kHalf + lane % kHalf)...) +
         __builtin_shufflevector(a, b, (lane / kHalf % 2 * n + lane / kHalf / 2 * 2 * kHalf + lane % kHalf + kHalf)...);
}

// The dot products of kCount weights, `kStride` apart, with the row's gradient: summed across lanes depth first, so
// that few partial sums are alive; product k ends in lanes k of the kCount blocks.
template <int kBytes, int kVectors, int kCount, class acc_t>
ZF_INLINE typename Vector<acc_t, kBytes>::type dots(const acc_t* const* x,
                                                    const typename Vector<acc_t, kBytes>::type* grad) {
  using vec = typename Vector<acc_t, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(acc_t)), kStride = kLanes / kCount;
  if constexpr (kCount == 1) {
    const vec* from = reinterpret_cast<const vec*>(*x);
    vec sum = from[0] * grad[0];
#pragma GCC unroll 8
    for (int v = 1; v < kVectors; ++v) sum += from[v] * grad[v];
    return sum;
  } else {
    const vec even = dots<kBytes, kVectors, kCount / 2>(x, grad);
    const vec odd = dots<kBytes, kVectors, kCount / 2>(x + kStride, grad);
    return fold<kStride>(even, odd, std::make_integer_sequence<int, kLanes>());
  }
}

template <int kBytes, int kVectors, class acc_t, class index_t>
ZF_INLINE void row_of_weights(const acc_t* x, const acc_t* grad, const index_t* column, int64_t i, int64_t end,
                              acc_t* sum, bool first) {
  using vec = typename Vector<acc_t, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(acc_t));
  vec own[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) own[v] = reinterpret_cast<const vec*>(grad)[v];
  for (; i < end; i += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, end - i));
    const acc_t* from[kLanes];
    // Beyond the end the last weight again: its product is not used.
    for (int k = 0; k < kLanes; ++k) from[k] = x + int64_t(column[k < n ? i + k : end - 1]) * kVectors * kLanes;
    vec found = dots<kBytes, kVectors, kLanes>(from, own);
    acc_t* to = sum + i;
    if (n == kLanes) {
      vec before = {};
      if (!first) std::memcpy(&before, to, sizeof before);
      found += before;
      std::memcpy(to, &found, sizeof found);
    } else {
      for (int k = 0; k < n; ++k) to[k] = first ? found[k] : to[k] + found[k];
    }
  }
}

}  // namespace zipfast::cpu
