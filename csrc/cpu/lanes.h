// SPDX-License-Identifier: Apache-2.0
// Batches packed so that samples lie side by side: [columns][lanes], in chunks of as many lanes as a row's sums fit
// registers.  What sparse layers compute on: one weight then meets whole vectors of samples.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
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
    for (int64_t k = 0; k < n; ++k)
      std::fill(to + k * chunk.lanes + chunk.count, to + (k + 1) * chunk.lanes, acc_t(0));
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

}  // namespace zipfast::cpu
