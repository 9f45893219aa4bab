// SPDX-License-Identifier: Apache-2.0
// First kernels of moments_' "wgmma" path (moments_packed.cuh): is there a shift, and features as operands.
//
// A block reads 32 features of 256 samples into registers, 32 numbers a thread, in 16-byte pieces where images allow
// it. Rows of operands are written in whole lines of 128 bytes.
#pragma once
#include "cuda/launch.h"
#include "cuda/scope.cuh"
#include "cuda/split.cuh"

namespace zipfast::cuda {
namespace packed {

constexpr int kTile = kPackedTile, kGroup = kPackedGroup, kRows = kPackedRows, kThreads = 256;
constexpr int kUnit = 8, kUnits = kGroup / kUnit;         // samples of 16 bytes of an operand; of a row
constexpr int kOwn = kRows * kUnits / kThreads;           // units of a thread
constexpr int kBlockK = 64, kBlocksK = kGroup / kBlockK;  // samples of a stage
static_assert(kGroup == kSplitSamples && kRows == 32 && kUnits == 32 && kOwn == 4);

struct alignas(16) Words {
  uint32_t word[4];
};

// First byte of block k of 64 samples of all high (half 0) or low operands.
__device__ inline int64_t image_of(const PackedSpace& s, int half, int64_t k) {
  return s.image + (half * int64_t(s.groups) * kBlocksK + k) * s.plan.padded * (kBlockK * 2);
}

__device__ inline float number(float x) { return x; }
__device__ inline float number(Half x) { return widen_low(x.bits); }
__device__ inline float number(BFloat16 x) { return widen(x); }

// One row of the stacked features.  (64-bit divisions cost more than all else that is done to a number.)
struct Row {
  int model = -1, feature = 0;  // -1: beyond the last
  float shift = 0;
};
__device__ inline Row row_of(const PackedJob& job, const PackedSpace& s, int64_t row) {
  if (row >= job.models * s.size) return {};
  const unsigned model = unsigned(row) / unsigned(s.size);
  return {int(model), int(unsigned(row) - model * unsigned(s.size)), float(s.shift[row])};
}

template <int kVector, class scalar_t>
struct alignas(kVector * sizeof(scalar_t) < 16 ? kVector * sizeof(scalar_t) : 16) Piece {
  scalar_t value[kVector];
};

// Eight samples from `sample` on of four rows: whole pieces of kVector neighbouring samples of one image.
template <int kVector, class scalar_t>
__device__ inline void load_images(const PackedJob& job, const PackedSpace& s, const Row (&row)[kOwn], int64_t sample,
                                   float (&v)[kOwn][kUnit]) {
  int64_t at[kUnit / kVector], image;
  if ((sample | s.inner) >> 32)
    image = sample / s.inner;
  else
    image = uint32_t(sample) / uint32_t(s.inner);
  int64_t place = sample - image * s.inner;
  ZF_UNROLL
  for (int p = 0; p < kUnit / kVector; ++p) {
    at[p] = sample + p * kVector < s.end ? image * s.size * s.inner + place : -1;
    if ((place += kVector) >= s.inner) place = 0, ++image;
  }
  ZF_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    const scalar_t* x = nullptr;
    if (row[i].model >= 0) x = static_cast<const scalar_t*>(job.x[s.pointer + row[i].model]) + row[i].feature * s.inner;
    ZF_UNROLL
    for (int p = 0; p < kUnit / kVector; ++p) {
      Piece<kVector, scalar_t> piece{};
      if (x && at[p] >= 0) piece = *reinterpret_cast<const Piece<kVector, scalar_t>*>(x + at[p]);
      ZF_UNROLL
      for (int e = 0; e < kVector; ++e) v[i][p * kVector + e] = number(piece.value[e]);
    }
  }
}

// 32 samples from `sample` on of one row; neighbouring threads read neighbouring features.
template <class scalar_t>
__device__ inline void load_tokens(const PackedJob& job, const PackedSpace& s, const Row& row, int64_t sample,
                                   float (&v)[kOwn][kUnit]) {
  const scalar_t* x = nullptr;
  if (row.model >= 0) x = static_cast<const scalar_t*>(job.x[s.pointer + row.model]) + row.feature + sample * s.size;
  const int64_t left = x ? s.end - sample : 0;
  ZF_UNROLL
  for (int i = 0; i < kOwn; ++i) ZF_UNROLL
  for (int e = 0; e < kUnit; ++e) v[i][e] = i * kUnit + e < left ? number(x[(i * kUnit + e) * s.size]) : 0.0f;
}

// Notes what is not finite, then shifts what is there; the sum of the unit.  `sample`: of its first number.
__device__ inline double centre(const PackedSpace& s, const Row& row, int64_t sample, float (&v)[kUnit]) {
  float none = 0;
  ZF_UNROLL
  for (int e = 0; e < kUnit; ++e) none += v[e] - v[e];
  if (none != 0) {  // NaN
    ZF_UNROLL
    for (int e = 0; e < kUnit; ++e)
      if (!(v[e] - v[e] == 0)) atomicMin(s.bad + row.model, (long long)((s.seen + sample + e) * s.size + row.feature));
  }
  ZF_UNROLL
  for (int e = 0; e < kUnit; ++e) v[e] = sample + e < s.end ? v[e] - row.shift : 0.0f;
  return double((v[0] + v[1]) + (v[2] + v[3])) + double((v[4] + v[5]) + (v[6] + v[7]));
}

__device__ inline uint32_t magnitude(const float (&v)[kUnit]) {
  uint32_t most = 0;  // of the bits: those of NaN and infinity lie above all others
  ZF_UNROLL
  for (int e = 0; e < kUnit; ++e) {
    const uint32_t bits = float_to_bits(v[e]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

// Operands of one unit: the inputs again, which is exact, or scaled and split.
template <class scalar_t>
__device__ inline void operands(bool plain, float scale, const float (&v)[kUnit], Words& high, Words& low) {
  ZF_UNROLL
  for (int w = 0; w < 4; ++w) {
    const float a = v[2 * w], b = v[2 * w + 1];
    if (!plain) {
      const Split split = split_two(a * scale, b * scale);
      high.word[w] = split.hi, low.word[w] = split.lo;
    } else if constexpr (std::is_same_v<scalar_t, BFloat16>)
      high.word[w] = float_to_bits(a) >> 16 | (float_to_bits(b) & 0xffff0000u);
    else
      high.word[w] = narrow_two(a, b);
  }
}

// Tokens (and other features that lie side by side): a thread has 32 samples of one row.  Units go through shared
// memory, laid out as they are to be, so that they leave in whole lines.
template <class scalar_t>
__device__ inline void pack_tokens(const PackedJob& job, const PackedSpace& s, bool plain, int64_t row0, int group) {
  __shared__ Words image[2][kBlocksK][kRows][kUnit];
  __shared__ uint32_t most[kThreads / 32][kRows];
  __shared__ double part[kThreads / 32][kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t features = job.models * s.size, row = row0 + lane;
  const int64_t first = s.begin + int64_t(group) * kGroup + warp * (kOwn * kUnit);
  const Row own = row_of(job, s, row);
  float v[kOwn][kUnit];
  load_tokens<scalar_t>(job, s, own, first, v);
  double sum = 0;
  uint32_t largest = 0;
  ZF_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    sum += centre(s, own, first + i * kUnit, v[i]);
    const uint32_t m = magnitude(v[i]);
    largest = m > largest ? m : largest;
  }
  most[warp][lane] = largest, part[warp][lane] = sum;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) largest = most[w][lane] > largest ? most[w][lane] : largest;
  const int k = split_exponent(bits_to_float(largest));
  if (warp == 0 && row < features) {
    sum = part[0][lane];
    for (int w = 1; w < kThreads / 32; ++w) sum += part[w][lane];
    job.rows[s.rows + group * features + row] = sum;
  }
  if (warp == 1 && !plain) job.scale[s.scale + group * s.plan.padded + row] = power_of_two(-k);
  ZF_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    Words high, low;
    operands<scalar_t>(plain, power_of_two(k), v[i], high, low);
    const int q = warp * kOwn + i, unit = (q % kUnit) ^ (lane % kUnit);
    image[0][q / kUnit][lane][unit] = high;
    if (!plain) image[1][q / kUnit][lane][unit] = low;
  }
  __syncthreads();
  for (int half = 0; half < (plain ? 1 : 2); ++half) {
    ZF_UNROLL
    for (int b = 0; b < kBlocksK; ++b) {
      Words* out =
          reinterpret_cast<Words*>(job.image + image_of(s, half, int64_t(group) * kBlocksK + b) + row0 * (kBlockK * 2));
      out[threadIdx.x] = image[half][b][threadIdx.x / kUnit][threadIdx.x % kUnit];
    }
  }
}

// Images: a warp has all samples of four rows, a thread one unit of each.
template <class scalar_t>
__device__ inline void pack_images(const PackedJob& job, const PackedSpace& s, bool plain, int64_t row0, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t features = job.models * s.size, first = row0 + warp * kOwn;
  const int64_t sample = s.begin + int64_t(group) * kGroup + lane * kUnit;
  Row row[kOwn];
  ZF_UNROLL
  for (int i = 0; i < kOwn; ++i) row[i] = row_of(job, s, first + i);
  float v[kOwn][kUnit];
  if (s.vector == 8 && sizeof(scalar_t) == 2)
    load_images<8, scalar_t>(job, s, row, sample, v);
  else if (s.vector >= 4)
    load_images<4, scalar_t>(job, s, row, sample, v);
  else
    load_images<1, scalar_t>(job, s, row, sample, v);
  unsigned char* out = job.image + image_of(s, 0, int64_t(group) * kBlocksK + lane / kUnit);
  const int64_t low_half = image_of(s, 1, 0) - image_of(s, 0, 0);
  ZF_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    double sum = centre(s, row[i], sample, v[i]);
    uint32_t largest = magnitude(v[i]);
    for (int step = 16; step > 0; step >>= 1) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
      const uint32_t other = __shfl_xor_sync(kFullWarp, largest, step);
      largest = other > largest ? other : largest;
    }
    const int k = split_exponent(bits_to_float(largest));
    if (lane == 0 && row[i].model >= 0) job.rows[s.rows + group * features + first + i] = sum;
    if (lane == 0 && !plain) job.scale[s.scale + group * s.plan.padded + first + i] = power_of_two(-k);
    Words high, low;
    operands<scalar_t>(plain, power_of_two(k), v[i], high, low);
    unsigned char* at = out + (first + i) * (kBlockK * 2) + ((lane % kUnit) ^ int((first + i) % kUnit)) * 16;
    *reinterpret_cast<Words*>(at) = high;
    if (!plain) *reinterpret_cast<Words*>(at + low_half) = low;
  }
}

template <class scalar_t>
__device__ inline bool is_plain(const PackedJob& job, int space) {
  return sizeof(scalar_t) == 2 && __shfl_sync(kFullWarp, job.plain[space], 0);
}

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 2) moments_pack_kernel(const __grid_constant__ PackedJob job) {
  const int space = rule::entry_of<&PackedSpace::pack>(job.space, job.spaces, blockIdx.x);
  const PackedSpace& s = job.space[space];
  const int pieces = int(s.plan.padded / kRows), local = int(blockIdx.x) - s.pack, group = local / pieces;
  const bool plain = is_plain<scalar_t>(job, space);
  if (s.inner == 1)
    pack_tokens<scalar_t>(job, s, plain, int64_t(local % pieces) * kRows, group);
  else
    pack_images<scalar_t>(job, s, plain, int64_t(local % pieces) * kRows, group);
}

// One block per space: are all its shifts zero?
__global__ void __launch_bounds__(kThreads) moments_plain_kernel(const __grid_constant__ PackedJob job) {
  const PackedSpace& s = job.space[blockIdx.x];
  bool shifted = false;
  for (int64_t f = threadIdx.x; f < job.models * s.size; f += kThreads) shifted |= s.shift[f] != 0;
  const int any = __syncthreads_or(shifted);
  if (threadIdx.x == 0) job.plain[blockIdx.x] = !any;
}

}  // namespace packed
}  // namespace zipfast::cuda
