// SPDX-License-Identifier: Apache-2.0
// The parts of the staged path of sparse_linear: how samples lie in shared memory, how they get there, and how entries
// are read.
#pragma once
#include <type_traits>

#include "cuda/scope.cuh"
#include "cuda/launch.h"
#include "cuda/split.cuh"

namespace zipfast::cuda {

// Blocks of a processor, as far as registers go: one sample leaves room for two.
template <int kSamples>
constexpr int kStagedBlocks = kSamples == 1 ? 2 : 1;

template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t at[kCount];
};

template <class scalar_t>
__device__ inline float low_of(uint32_t two) {
  if constexpr (std::is_same_v<scalar_t, Half>)
    return widen_low(two);
  else
    return bits_to_float(two << 16);
}
template <class scalar_t>
__device__ inline float high_of(uint32_t two) {
  if constexpr (std::is_same_v<scalar_t, Half>)
    return widen_high(two);
  else
    return bits_to_float(two & 0xffff0000u);
}

// How the samples of a column lie in shared memory: one as a float, several as they come, in words of at most 16 bytes,
// more of those in planes.
template <class scalar_t, int kSamples>
struct Layout {
  static constexpr bool kTwo = sizeof(scalar_t) == 2 && kSamples > 1;  // two samples in a word
  static constexpr int kWords = kTwo ? kSamples / 2 : kSamples;
  static constexpr int kEach = kWords < 4 ? kWords : 4, kPlanes = kWords / kEach;
  using Word = Words<kEach>;
};

// Columns, the zero, and one more where that makes their number even.
ZF_HD inline int staged_columns(long long columns) { return int(columns + 2) / 2 * 2; }

// What a thread has in hand while it copies samples to shared memory: kUnits words of each sample, side by side in the
// input for neighbouring threads; a word of 16-bit numbers is two columns.
template <class scalar_t, int kSamples>
struct Stage {
  using L = Layout<scalar_t, kSamples>;
  static constexpr int kColumns = 4 / int(sizeof(scalar_t));
  static constexpr int kUnits = kSamples <= 4 ? 4 : 16 / kSamples;
  uint32_t word[kUnits][kSamples];

  __device__ static int units(const SparseJob& job) { return staged_columns(job.columns) / kColumns; }

  __device__ static uint32_t read(const SparseJob& job, int sample, int unit) {
    const int column = unit * kColumns, left = int(job.columns) - column;
    if (sample >= job.batch || left <= 0) return 0;
    const scalar_t* from = static_cast<const scalar_t*>(job.x) + (sample * int(job.columns) + column);
    if (left >= kColumns && reinterpret_cast<uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const uint32_t*>(from);
    const uint16_t* each = reinterpret_cast<const uint16_t*>(from);
    return uint32_t(each[0]) | (left > 1 ? uint32_t(each[1]) << 16 : 0u);
  }

  __device__ void load(const SparseJob& job, int sample, int unit) {
    ZF_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      ZF_UNROLL
      for (int s = 0; s < kSamples; ++s)
        word[u][s] = unit + u * kStagedThreads < units(job) ? read(job, sample + s, unit + u * kStagedThreads) : 0u;
    }
  }

  __device__ void store(const SparseJob& job, typename L::Word* shared, int unit) const {
    const int plane = staged_columns(job.columns);
    // Two columns of neighbouring lanes lie 2 words apart: lanes that would share a bank begin with the other column.
    const bool swap = threadIdx.x & (16 / L::kEach);
    ZF_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int column = (unit + u * kStagedThreads) * kColumns;
      if (column >= plane) continue;
      ZF_UNROLL
      for (int p = 0; p < L::kPlanes; ++p) {
        typename L::Word low, high;
        ZF_UNROLL
        for (int j = 0; j < L::kEach; ++j) {
          const int i = p * L::kEach + j;
          if constexpr (L::kTwo) {
            const uint32_t a = word[u][2 * i], b = word[u][2 * i + 1];
            low.at[j] = (a & 0xffffu) | b << 16;
            high.at[j] = a >> 16 | (b & 0xffff0000u);
          } else if constexpr (kColumns == 2) {
            low.at[j] = float_to_bits(low_of<scalar_t>(word[u][i]));
            high.at[j] = float_to_bits(high_of<scalar_t>(word[u][i]));
          } else {
            low.at[j] = word[u][i];
          }
        }
        typename L::Word* to = shared + p * plane + column;
        if constexpr (kColumns == 1) {
          to[0] = low;
        } else {
          typename L::Word first, second;
          ZF_UNROLL
          for (int j = 0; j < L::kEach; ++j) {
            first.at[j] = swap ? high.at[j] : low.at[j];
            second.at[j] = swap ? low.at[j] : high.at[j];
          }
          to[swap] = first;
          to[!swap] = second;
        }
      }
    }
  }
};

// 8 entries, from a place that 8 divides.
template <class scalar_t>
struct Entries {
  static constexpr int kCount = 8, kValues = 2 * int(sizeof(scalar_t));
  Words<4> column, value[kValues / 4];

  __device__ void load(const SparseJob& job, uint32_t at) {
    const uint16_t* columns = static_cast<const uint16_t*>(job.column) + at;
    const scalar_t* values = static_cast<const scalar_t*>(job.value) + at;
    if (at + kCount <= job.alive) {
      column = *reinterpret_cast<const Words<4>*>(columns);
      ZF_UNROLL
      for (int j = 0; j < kValues / 4; ++j) value[j] = reinterpret_cast<const Words<4>*>(values)[j];
      return;
    }
    const int count = int(job.alive - at);  // the end of the arrays
    ZF_UNROLL
    for (int i = 0; i < kCount; ++i) put(i, i < count ? columns[i] : 0u, i < count ? bits(values[i]) : 0u);
  }

  // Entries outside of [begin, end) belong to other rows: 0 times the zero behind the last column.
  __device__ void keep(uint32_t at, uint32_t begin, uint32_t end, uint32_t zero) {
    ZF_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (at + i < begin || at + i >= end) put(i, zero, 0u);
  }

  __device__ uint32_t column_at(int i) const { return column.at[i / 2] >> 16 * (i % 2) & 0xffffu; }
  __device__ float value_at(int i) const {
    if constexpr (sizeof(scalar_t) == 4) return bits_to_float(value[i / 4].at[i % 4]);
    const uint32_t two = value[0].at[i / 2];
    return i % 2 ? high_of<scalar_t>(two) : low_of<scalar_t>(two);
  }

 private:
  __device__ static uint32_t bits(float x) { return float_to_bits(x); }
  template <class T>
  __device__ static uint32_t bits(T x) {
    return x.bits;
  }
  __device__ static void half(uint32_t& two, int i, uint32_t x) {
    two = i % 2 ? (two & 0xffffu) | x << 16 : (two & 0xffff0000u) | x;
  }
  __device__ void put(int i, uint32_t c, uint32_t v) {
    half(column.at[i / 2], i, c);
    if constexpr (sizeof(scalar_t) == 4)
      value[i / 4].at[i % 4] = v;
    else
      half(value[0].at[i / 2], i, v);
  }
};

// Asks for the first entries before anything else is known: they are on their way from memory while row_start and the
// input are read.  Every block asks for its share of what the blocks will read first, wherever rows begin.
template <class scalar_t>
__device__ inline void ask_ahead([[maybe_unused]] const SparseJob& job) {
#if !defined(ZF_EMU) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr long long kShare = 16384;
  if (threadIdx.x != 0 || blockIdx.y != 0) return;
  const long long all = job.alive < kShare * gridDim.x ? job.alive : kShare * gridDim.x;
  const long long begin = all * blockIdx.x / gridDim.x / 8 * 8, end = all * (blockIdx.x + 1) / gridDim.x / 8 * 8;
  if (begin == end) return;
  const void* columns = static_cast<const uint16_t*>(job.column) + begin;
  const void* values = static_cast<const scalar_t*>(job.value) + begin;
  const unsigned count = unsigned(end - begin);
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(columns), "r"(count * 2) : "memory");
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(values), "r"(count * unsigned(sizeof(scalar_t)))
               : "memory");
#endif
}

}  // namespace zipfast::cuda
