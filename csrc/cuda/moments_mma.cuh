// SPDX-License-Identifier: Apache-2.0
// moments_ on tensor cores, straight from the feature tensors (compute capability 8.0 and newer): path "mma".
//
// The cut is that of the generic path: a block owns one 64 x 64 tile of the upper triangle of one space and one part of
// the samples.  64 samples at a time go through shared memory as float16, feature by feature; four warps form 32 x 32
// pieces each.
//   plain   float16 or bfloat16 features that no shift applies to: the numbers themselves; their products are exact.
//   split   all others: x - c as two float16 numbers (split.cuh), three products.  The exponent of a feature belongs to
//           the 64 samples at hand, so nothing about the batch has to be known before.
// Which of the two a tile takes follows from its shifts, on the device.  The sums of tensor cores are cut off, so they
// are added to float32 registers, which round to nearest, after 256 samples (split: 64), and those after 16384 to this
// block's part, in float32 (or to the co-moments, in float64, where there is one part only).
// Why tiles of 64 although larger ones ask less of the second-level cache: four blocks fit on a multiprocessor, so that
// the loads of one run under the products of the others, and spaces of 32 to 256 features, for which this path is
// meant, waste little.  Shared memory: 16-byte units of a row are permuted, so that neither fragments nor transposed
// stores meet in a bank.
#pragma once
#include "cuda/launch.h"
#include "cuda/moments_slab.cuh"
#include "cuda/scope.cuh"
#include "cuda/tensor_core.cuh"

namespace zipfast::cuda {

constexpr int kMmaFlush = 256;
#ifdef ZF_EMU
constexpr int kMmaDouble = 512;  // small: tests are to see several
#else
constexpr int kMmaDouble = 16384;  // samples whose sums stay in float32
#endif
static_assert(kMmaFlush % kMmaSamples == 0 && kMmaDouble % kMmaFlush == 0);

// The fragments of 16 rows (or twice 8 columns) and 16 samples.
__device__ inline void mma_fragment(uint32_t (&r)[4], const uint16_t (*plane)[kMmaSamples], int row0, int unit0,
                                    bool columns) {
  const int lane = anew(threadIdx.x % 32);
  const int row = row0 + lane % 8 + 8 * (columns ? lane / 16 : lane / 8 % 2);
  const int unit = unit0 + (columns ? lane / 8 % 2 : lane / 16);
  ldmatrix_x4(r, &plane[row][mma_unit(row, unit) * 8]);
}

// acc += a b^T over the chunk's samples, for a warp's 32 x 32.
template <class half_t, bool kSplit>
__device__ inline void mma_chunk(const MmaOperand& a, const MmaOperand& b, int row0, int col0, float (&acc)[2][4][4]) {
  ZF_UNROLL
  for (int unit = 0; unit < kMmaUnits; unit += 2) {
    uint32_t a_hi[2][4], b_hi[2][4];
    ZF_UNROLL
    for (int i = 0; i < 2; ++i) {
      mma_fragment(a_hi[i], a.hi, row0 + 16 * i, unit, false);
      mma_fragment(b_hi[i], b.hi, col0 + 16 * i, unit, true);
    }
    const auto add_products = [&acc](const uint32_t (&rows)[2][4], const uint32_t (&columns)[2][4]) {
      ZF_UNROLL
      for (int i = 0; i < 2; ++i) ZF_UNROLL
      for (int j = 0; j < 4; ++j)
        mma_m16n8k16<half_t>(acc[i][j], rows[i], columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]);
    };
    add_products(a_hi, b_hi);
    if constexpr (kSplit) {
      uint32_t lo[2][4];
      ZF_UNROLL
      for (int j = 0; j < 2; ++j) mma_fragment(lo[j], b.lo, col0 + 16 * j, unit, true);
      add_products(a_hi, lo);
      ZF_UNROLL
      for (int i = 0; i < 2; ++i) mma_fragment(lo[i], a.lo, row0 + 16 * i, unit, false);
      add_products(lo, b_hi);
    }
  }
}

// Entry [i][j][e] of a warp's piece: its row and column within the tile.
__device__ inline int mma_row(int row0, int i, int e) { return row0 + 16 * i + threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ inline int mma_col(int col0, int j, int e) { return col0 + 8 * j + threadIdx.x % 4 * 2 + e % 2; }

// The tile and the samples of a block.
struct MmaTile {
  int features, row0, col0, begin, end;
  __device__ MmaTile(const MomentsJob& job, const MomentsSpace& s, int local) : features(job.models * int(s.size)) {
    const int64_t samples = s.outer * s.inner;
    const int split = local % s.splits;
    int row, col;
    rule::triangle_tile(int(moments_side(features)), local / s.splits, &row, &col);
    row0 = row * kMomentsTile, col0 = col * kMomentsTile;
    begin = int(samples * split / s.splits), end = int(samples * (split + 1) / s.splits);
  }
  __device__ bool diagonal() const { return row0 == col0; }
  __device__ int features_of(int side) const {  // of 64 rows or columns, how many there are
    const int left = features - (side ? col0 : row0);
    return left < kMomentsTile ? left : kMomentsTile;
  }
};

struct MmaShared {
  const void* from[2][kMomentsTile];  // first sample of each feature
  MmaOperand operand[2];              // rows, columns
  int feature0[2], features[2];       // of rows and columns: the first, and how many there are
  double sums[kMomentsTile][16];
  float shift[2][kMomentsTile];
};

// Adds a piece to this block's part, which nobody else writes, or straight to the co-moments.
__device__ inline void mma_add(const MomentsJob& job, const MomentsSpace& s, int local, const MmaTile& tile, bool first,
                               const float (*piece)[kMomentsTile]) {
  double* own = s.splits > 1 ? job.partial + s.partial + local * moments_partial(MomentsPath::mma) : nullptr;
  float* partial = own ? reinterpret_cast<float*>(own + kMomentsTile) : nullptr;
  for (int e = threadIdx.x; e < kMomentsTile * kMomentsTile; e += kMmaThreads) {
    const int row = tile.row0 + e / kMomentsTile, col = tile.col0 + e % kMomentsTile;
    if (row > col || col >= tile.features) continue;
    const float part = piece[e / kMomentsTile][e % kMomentsTile];
    if (partial)
      partial[e] = first ? part : partial[e] + part;
    else
      s.comoment[int64_t(row) * tile.features + col] += double(part);
  }
}

template <class scalar_t, bool kTokens, bool kPlain>
__device__ inline void moments_mma_tile(const MomentsJob& job, const MomentsSpace& s, int local, MmaShared& shared) {
  using half_t = typename std::conditional<kPlain && std::is_same<scalar_t, BFloat16>::value, BFloat16, Half>::type;
  using Slab = MmaSlab<scalar_t, kTokens>;
  const MmaTile tile(job, s, anew(local));
  const bool diagonal = tile.diagonal();
  const int begin = tile.begin, end = tile.end;
  const int thread = int(threadIdx.x), warp_row = thread / 64 * 32, warp_col = thread / 32 % 2 * 32;
  const bool idle = diagonal && warp_row > warp_col;  // all of it below the diagonal
  MmaOperand &a = shared.operand[0], &b = shared.operand[diagonal ? 0 : 1];

  MmaPlace place(begin, int(s.inner));
  // Brings 64 samples of a slab into an operand; ends without a barrier.
  auto bring = [&](int side, int n, int samples) {
    MmaOperand& out = shared.operand[side];
    typename Slab::Values value;
    const Slab slab(s, shared.feature0[side], shared.features[side], shared.from[side]);
    slab.fetch(samples, place, value);
    if (diagonal) slab.observe(value, n, samples, shared.shift[side], shared.sums);
    if constexpr (kPlain) {
      slab.store_plain(value, out);
    } else {
      float x[kMmaValues];
      slab.shifted(value, samples, shared.shift[side], x, out);
      __syncthreads();
      slab.store_split(x, out);
      if (thread < kMomentsTile) out.back[thread] = power_of_two(-split_exponent(bits_to_float(out.peak[thread])));
    }
  };
  float sum[2][4][4] = {}, acc[2][4][4] = {};
  for (int n0 = begin; n0 < end; n0 += kMmaDouble) {
    const int n1 = end - n0 > kMmaDouble ? n0 + kMmaDouble : end;
    for (int n = n0; n < n1; n += kMmaSamples) {
      const int here = n1 - n < kMmaSamples ? n1 - n : kMmaSamples;
      bring(0, n, here);
      if (!diagonal) bring(1, n, here);
      place.advance(int(s.inner));
      __syncthreads();
      if (!kPlain && thread < kMomentsTile) shared.operand[0].peak[thread] = shared.operand[1].peak[thread] = 0;
      if (!idle) {
        mma_chunk<half_t, !kPlain>(a, b, warp_row, warp_col, acc);
        if (!kPlain || (n - n0 + kMmaSamples) % kMmaFlush == 0 || n + kMmaSamples >= n1) {
          ZF_UNROLL
          for (int i = 0; i < 2; ++i) ZF_UNROLL
          for (int j = 0; j < 4; ++j) ZF_UNROLL
          for (int e = 0; e < 4; ++e) {
            float part = acc[i][j][e];
            if (!kPlain) part = part * a.back[mma_row(warp_row, i, e)] * b.back[mma_col(warp_col, j, e)];
            sum[i][j][e] += part;
            acc[i][j][e] = 0;
          }
        }
      }
      __syncthreads();  // the operands may be overwritten
    }
    // To float64, row by row through shared memory: the numbers of the first operand are not needed any more.
    float (*piece)[kMomentsTile] = reinterpret_cast<float (*)[kMomentsTile]>(shared.operand);
    ZF_UNROLL
    for (int i = 0; i < 2; ++i) ZF_UNROLL
    for (int j = 0; j < 4; ++j) ZF_UNROLL
    for (int e = 0; e < 4; ++e) {
      piece[mma_row(warp_row, i, e)][mma_col(warp_col, j, e)] = sum[i][j][e];
      sum[i][j][e] = 0;
    }
    __syncthreads();
    mma_add(job, s, local, MmaTile(job, s, anew(local)), n0 == begin, piece);
    __syncthreads();
  }
}

// Shifts and places of the tile's rows and columns; whether any shift is not 0, in every thread.
template <class scalar_t>
__device__ inline bool mma_begin(const MomentsJob& job, const MomentsSpace& s, const MmaTile& tile, MmaShared& shared) {
  const int side = threadIdx.x / kMomentsTile, own = threadIdx.x % kMomentsTile;
  const int f = (side ? tile.col0 : tile.row0) + own;
  const float c = f < tile.features ? float(s.shift[f]) : 0.f;
  shared.shift[side][own] = c;
  if (own == 0) shared.feature0[side] = side ? tile.col0 : tile.row0, shared.features[side] = tile.features_of(side);
  shared.from[side][own] =
      f < tile.features ? static_cast<const scalar_t*>(job.x[s.pointer + f / int(s.size)]) + f % int(s.size) * s.inner
                        : nullptr;
  shared.operand[side].peak[own] = 0;
  for (int e = threadIdx.x; e < kMomentsTile * 16; e += kMmaThreads) shared.sums[e / 16][e % 16] = 0;
  return __syncthreads_or(c != 0);
}

// Sums of features, which the blocks of the diagonal have.
__device__ inline void mma_total(const MomentsJob& job, const MomentsSpace& s, int local, const MmaTile& tile,
                                 const MmaShared& shared) {
  const int own = int(threadIdx.x);
  if (!tile.diagonal() || own >= kMomentsTile || tile.row0 + own >= tile.features) return;
  double total = 0;
  for (int t = 0; t < 16; ++t) total += shared.sums[own][t];
  if (s.splits > 1)
    job.partial[s.partial + local * moments_partial(MomentsPath::mma) + own] = total;
  else
    s.total[tile.row0 + own] += total;
}

// Three blocks a multiprocessor.
template <class scalar_t>
__global__ void __launch_bounds__(kMmaThreads, 3) moments_mma_kernel(const __grid_constant__ MomentsJob job) {
  __shared__ MmaShared shared;
  const MomentsSpace& s = job.space[rule::entry_of<&MomentsSpace::block>(job.space, job.spaces, blockIdx.x)];
  const int local = blockIdx.x - s.block;
  const bool moved = mma_begin<scalar_t>(job, s, MmaTile(job, s, anew(local)), shared);
  const bool tokens = s.inner == 1;
  bool done = false;
  if constexpr (sizeof(scalar_t) == 2) {
    if (!moved) {
      if (tokens)
        moments_mma_tile<scalar_t, true, true>(job, s, local, shared);
      else
        moments_mma_tile<scalar_t, false, true>(job, s, local, shared);
      done = true;
    }
  }
  if (!done) {
    if (tokens)
      moments_mma_tile<scalar_t, true, false>(job, s, anew(local), shared);
    else
      moments_mma_tile<scalar_t, false, false>(job, s, local, shared);
  }
  mma_total(job, s, local, MmaTile(job, s, anew(local)), shared);
}

}  // namespace zipfast::cuda
