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

// Copies samples to shared memory, the zero included.  `copy` takes words of the input as they lie, kUnits of each
// sample in hand at a time, side by side for neighbouring threads; a word of 16-bit numbers is two columns.
template <class scalar_t, int kSamples>
struct Stage {
  using L = Layout<scalar_t, kSamples>;
  static constexpr int kColumns = 4 / int(sizeof(scalar_t));
  static constexpr int kUnits = kSamples <= 4 ? 4 : 16 / kSamples;
  uint32_t word[kUnits][kSamples];

  // Whether no word lies across two samples; else `copy_each`.
  __device__ static bool whole(const SparseJob& job) {
    return kColumns == 1 || (job.columns % 2 == 0 && reinterpret_cast<uintptr_t>(job.x) % 4 == 0);
  }

  __device__ void load(const SparseJob& job, int sample, int unit) {
    const int units = int(job.columns) / kColumns;
    const uint32_t* x = static_cast<const uint32_t*>(job.x);
    ZF_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int at = unit + u * kStagedThreads;
      ZF_UNROLL
      for (int s = 0; s < kSamples; ++s)
        word[u][s] = at < units && sample + s < job.batch ? x[(sample + s) * units + at] : 0u;
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
        typename L::Word* to = shared + p * plane + column;
        if constexpr (kColumns == 1) {
          typename L::Word all;
          ZF_UNROLL
          for (int j = 0; j < L::kEach; ++j) all.at[j] = word[u][p * L::kEach + j];
          to[0] = all;
        } else {
          typename L::Word first, second;
          ZF_UNROLL
          for (int j = 0; j < L::kEach; ++j) {
            const int i = p * L::kEach + j;
            const uint32_t a = word[u][L::kTwo ? 2 * i : i], b = word[u][L::kTwo ? 2 * i + 1 : i];
            const uint32_t low = L::kTwo ? (a & 0xffffu) | b << 16 : float_to_bits(low_of<scalar_t>(a));
            const uint32_t high = L::kTwo ? a >> 16 | (b & 0xffff0000u) : float_to_bits(high_of<scalar_t>(a));
            first.at[j] = swap ? high : low;
            second.at[j] = swap ? low : high;
          }
          to[swap] = first;
          to[!swap] = second;
        }
      }
    }
  }

  // The first `load` has been done.
  __device__ void copy(const SparseJob& job, typename L::Word* shared, int sample) {
    for (int unit = threadIdx.x, units = staged_columns(job.columns) / kColumns; unit < units;) {
      store(job, shared, unit);
      unit += kUnits * kStagedThreads;
      if (unit < units) load(job, sample, unit);
    }
  }

  __device__ static void copy_each(const SparseJob& job, typename L::Word* shared, int sample) {
    const int plane = staged_columns(job.columns);
    const scalar_t* x = static_cast<const scalar_t*>(job.x);
    const auto bits = [&](int s, int column) -> uint32_t {
      if (sample + s >= job.batch || column >= job.columns) return 0;
      const scalar_t found = x[(long long)(sample + s) * job.columns + column];
      if constexpr (L::kTwo)
        return found.bits;
      else
        return float_to_bits(widen(found));
    };
    for (int column = threadIdx.x; column < plane; column += kStagedThreads) {
      ZF_UNROLL
      for (int w = 0; w < L::kWords; ++w)
        shared[w / L::kEach * plane + column].at[w % L::kEach] =
            L::kTwo ? bits(2 * w, column) | bits(2 * w + 1, column) << 16 : bits(w, column);
    }
  }
};

// 8 entries, from a place that 8 divides; all 8 lie in the arrays.
template <class scalar_t>
struct Entries {
  static constexpr int kCount = 8, kValues = 2 * int(sizeof(scalar_t));
  Words<4> column, value[kValues / 4];

  __device__ void load(const SparseJob& job, uint32_t at) {
    column = *reinterpret_cast<const Words<4>*>(static_cast<const uint16_t*>(job.column) + at);
    const scalar_t* values = static_cast<const scalar_t*>(job.value) + at;
    ZF_UNROLL
    for (int j = 0; j < kValues / 4; ++j) value[j] = reinterpret_cast<const Words<4>*>(values)[j];
  }

  // Entries outside of [begin, end) belong to other rows: 0 times the zero behind the last column.
  __device__ void keep(uint32_t at, uint32_t begin, uint32_t end, uint32_t zero) {
    ZF_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (at + i < begin || at + i >= end) put(i, zero);
  }

  __device__ uint32_t column_at(int i) const { return column.at[i / 2] >> 16 * (i % 2) & 0xffffu; }
  __device__ float value_at(int i) const {
    if constexpr (sizeof(scalar_t) == 4) return bits_to_float(value[i / 4].at[i % 4]);
    const uint32_t two = value[0].at[i / 2];
    return i % 2 ? high_of<scalar_t>(two) : low_of<scalar_t>(two);
  }

 private:
  __device__ static void half(uint32_t& two, int i, uint32_t x) {
    two = i % 2 ? (two & 0xffffu) | x << 16 : (two & 0xffff0000u) | x;
  }
  __device__ void put(int i, uint32_t c) {
    half(column.at[i / 2], i, c);
    if constexpr (sizeof(scalar_t) == 4)
      value[i / 4].at[i % 4] = 0;
    else
      half(value[0].at[i / 2], i, 0);
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
