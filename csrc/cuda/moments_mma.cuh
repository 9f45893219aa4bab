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
#include "cuda/scope.cuh"
#include "cuda/split.cuh"
#include "cuda/tensor_core.cuh"

namespace zipfast::cuda {

constexpr int kMmaSamples = 64, kMmaThreads = 128, kMmaValues = kMomentsTile * kMmaSamples / kMmaThreads;
constexpr int kMmaUnits = kMmaSamples / 8;  // of 16 bytes in a row
constexpr int kMmaFlush = 256;
#ifdef ZF_EMU
constexpr int kMmaDouble = 512;  // small: tests are to see several
#else
constexpr int kMmaDouble = 16384;  // samples whose sums stay in float32
#endif
static_assert(kMomentsTile == 64 && kMmaFlush % kMmaSamples == 0 && kMmaDouble % kMmaFlush == 0);

// Half a tile's worth of samples: a row is a feature.
struct MmaOperand {
  alignas(16) uint16_t hi[kMomentsTile][kMmaSamples], lo[kMomentsTile][kMmaSamples];
  float back[kMomentsTile];     // 2^-k
  unsigned peak[kMomentsTile];  // bits of the largest magnitude: ordered as integers are
};

// x, in a way that hides from the compiler that it is the same in every round of a loop: else it keeps dozens of
// addresses in registers that are an operation or two each.
__device__ inline int anew(int x) {
#ifndef ZF_EMU
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Where unit u of row r lies.
__device__ inline int mma_unit(int r, int u) { return (u ^ r ^ (r >> 3)) & (kMmaUnits - 1); }

// What a thread holds of 64 features x 64 samples, 32 values in runs of 8 that lie side by side in memory.
//   images (inner > 1)   run i is of feature thread / 8 + 16 i, samples 8 (thread % 8) and the next
//   tokens (inner == 1)  run i is of sample 2 (thread / 8) + 32 (i / 2) + i % 2, features 8 (thread % 8) and the next
// Two samples of one feature, which make a word of an operand, are then neighbours in a run, or equal places of two
// runs.
// Where a thread's first sample of a chunk lies: images, position < inner; tokens: image is the chunk's first sample.
struct MmaPlace {
  int image, position;
  __device__ MmaPlace(int sample0, int inner)
      : image(sample0 / inner), position(inner == 1 ? 0 : sample0 % inner + 8 * int(threadIdx.x % 8)) {
    wrap(inner);
  }
  __device__ void advance(int inner) {
    if (inner == 1) {
      image += kMmaSamples;
    } else {
      position += kMmaSamples;
      wrap(inner);
    }
  }

 private:
  __device__ void wrap(int inner) {
    const int images = position / inner;
    image += images, position -= images * inner;
  }
};

template <class scalar_t>
struct MmaValues {
  static constexpr int kWords = kMmaValues * sizeof(scalar_t) / 4;
  uint32_t word[kWords];  // halves two to a word, as they lie in memory

  __device__ float get(int e) const {
    if constexpr (sizeof(scalar_t) == 4)
      return bits_to_float(word[e]);
    else if constexpr (std::is_same<scalar_t, Half>::value)
      return e % 2 ? widen_high(word[e / 2]) : widen_low(word[e / 2]);
    else
      return bits_to_float(e % 2 ? word[e / 2] & 0xffff0000u : word[e / 2] << 16);
  }
  __device__ void fill(int run, const scalar_t (&x)[8]) {
    constexpr int kRunWords = 8 * sizeof(scalar_t) / 4;
    ZF_UNROLL
    for (int w = 0; w < kRunWords; ++w) {
      if constexpr (sizeof(scalar_t) == 4)
        word[run * kRunWords + w] = float_to_bits(x[w]);
      else
        word[run * kRunWords + w] = uint32_t(x[2 * w].bits) | uint32_t(x[2 * w + 1].bits) << 16;
    }
  }
  // Moves run `run` down by one value and puts x at its end: eight of these fill it, in a loop that needs no more
  // registers than one round of it.
  __device__ void push(int run, scalar_t x) {
    constexpr int kRunWords = 8 * sizeof(scalar_t) / 4;
    uint32_t* own = word + run * kRunWords;
    ZF_UNROLL
    for (int w = 0; w + 1 < kRunWords; ++w) {
      if constexpr (sizeof(scalar_t) == 4)
        own[w] = own[w + 1];
      else
        own[w] = own[w] >> 16 | own[w + 1] << 16;
    }
    if constexpr (sizeof(scalar_t) == 4)
      own[kRunWords - 1] = float_to_bits(x);
    else
      own[kRunWords - 1] = own[kRunWords - 1] >> 16 | uint32_t(x.bits) << 16;
  }
};

template <class scalar_t, bool kTokens>
class MmaSlab {
 public:
  using Values = MmaValues<scalar_t>;
  static constexpr int kRun = 8, kRuns = kMmaValues / kRun;
  static constexpr int kFeatures = kTokens ? kRun : kRuns;  // of a thread
  static constexpr int kPairs = kMmaValues / 2, kRunWords = kRun * sizeof(scalar_t) / 4;
  struct alignas(16) Quad {
    uint32_t word[4];
  };

  // `from` [64]: where each feature's first sample lies, null beyond the last feature.
  __device__ MmaSlab(const MomentsSpace& s, int feature0, int features, const void* const* from)
      : s_(s),
        from_(from),
        feature0_(feature0),
        features_(features),
        row_(anew(threadIdx.x / 8)),
        unit_(anew(threadIdx.x % 8)) {}

  // 64 samples from sample0 on, `samples` of which exist; this thread's first one is at `place`.  Zero beyond the ends.
  __device__ void fetch(int samples, MmaPlace place, Values& value) const {
    ZF_UNROLL
    for (int i = 0; i < kRuns; ++i) {
      ZF_UNROLL
      for (int w = 0; w < kRunWords; ++w) value.word[i * kRunWords + w] = 0;
      const int left = samples - sample(i * kRun);
      const scalar_t* x = pointer(i * kRun);
      if (!x || left <= 0) continue;
      if constexpr (kTokens) {
        x += int64_t(place.image + sample(i * kRun)) * s_.size;
        const scalar_t* last = pointer(i * kRun + kRun - 1);
        if (last && last - pointer(i * kRun) == kRun - 1 && aligned(x)) {
          load_run<4>(x, value, i);
          continue;
        }
        scalar_t one[kRun];
        ZF_UNROLL
        for (int e = 0; e < kRun; ++e) {
          const scalar_t* y = pointer(i * kRun + e);
          one[e] = y ? y[int64_t(place.image + sample(i * kRun)) * s_.size] : scalar_t{};
        }
        value.fill(i, one);
      } else {
        const int64_t stride = s_.size * s_.inner;
        x += int64_t(place.image) * stride + place.position;
        const int inner = int(s_.inner), here = inner - place.position;  // samples that this image still has
        const int unaligned = int(reinterpret_cast<uintptr_t>(x) & 15);
        if (left >= kRun && here >= kRun && unaligned % 8 == 0) {
          if (unaligned == 0)
            load_run<4>(x, value, i);
          else
            load_run<2>(x, value, i);  // every other row of 14 x 14 float16 images
        } else if (inner >= kRun) {
          scalar_t one[kRun];
          ZF_UNROLL
          for (int e = 0; e < kRun; ++e) one[e] = e < left ? x[e < here ? e : e + stride - inner] : scalar_t{};
          value.fill(i, one);
        } else {
          int position = place.position;
          ZF_ROLLED
          for (int e = 0; e < kRun; ++e) {
            value.push(i, e < left ? *x : scalar_t{});
            ++x;
            if (++position == inner) position = 0, x += stride - inner;
          }
        }
      }
    }
  }

  __device__ int feature(int e) const { return kTokens ? 8 * unit_ + e % kRun : row_ + 16 * (e / kRun); }
  __device__ int sample(int e) const {
    return kTokens ? 2 * row_ + 32 * (e / (2 * kRun)) + e / kRun % 2 : kRun * unit_ + e % kRun;
  }
  // Notes what is not finite, and adds x - c to this thread's places in `sums`: [features of the tile][threads].
  __device__ void observe(const Values& value, int sample0, int samples, const float* shift, double (*sums)[16]) const {
    unsigned bad = 0;  // a bit for each value
    ZF_UNROLL
    for (int slot = 0; slot < kFeatures; ++slot) {
      float sum = 0;
      const float c = shift[feature(entry(slot, 0))];
      ZF_UNROLL
      for (int k = 0; k < kMmaValues / kFeatures; ++k) {
        const int e = entry(slot, k);
        const float x = value.get(e);
        if (!(x - x == 0)) bad |= 1u << e;
        if (feature(e) < features_ && sample(e) < samples) sum += x - c;
      }
      sums[feature(entry(slot, 0))][kTokens ? row_ : unit_] += double(sum);
    }
    for (; bad; bad &= bad - 1) {
      const int e = __ffs(int(bad)) - 1;
      const int f = feature0_ + feature(e), size = int(s_.size);
      const int64_t n = s_.seen + sample0 + sample(e);
      atomicMin(s_.bad + f / size, (long long)(n * s_.size + f % size));
    }
  }

  // The numbers as they are, of a half type.
  __device__ void store_plain(const Values& value, MmaOperand& out) const {
    if constexpr (kTokens) {
      ZF_UNROLL
      for (int p = 0; p < kPairs; p += 2) {  // two features of two samples
        const uint32_t here = value.word[first(p) / 2], next = value.word[second(p) / 2];
        put(out.hi, p, (here & 0xffffu) | next << 16);
        put(out.hi, p + 1, here >> 16 | (next & 0xffff0000u));
      }
    } else {
      ZF_UNROLL
      for (int p = 0; p < kPairs; p += 4) {
        Quad four;
        ZF_UNROLL
        for (int q = 0; q < 4; ++q) four.word[q] = value.word[p + q];
        *reinterpret_cast<Quad*>(place(out.hi, p)) = four;
      }
    }
  }

  // x - c, 0 for what does not exist, and its magnitude into out.peak, which was 0.
  __device__ void shifted(const Values& value, int samples, const float* shift, float (&x)[kMmaValues],
                          MmaOperand& out) const {
    ZF_UNROLL
    for (int slot = 0; slot < kFeatures; ++slot) {
      unsigned peak = 0;
      const float c = shift[feature(entry(slot, 0))];
      ZF_UNROLL
      for (int k = 0; k < kMmaValues / kFeatures; ++k) {
        const int e = entry(slot, k);
        x[e] = feature(e) < features_ && sample(e) < samples ? value.get(e) - c : 0.f;
        const unsigned magnitude = float_to_bits(x[e]) & 0x7fffffffu;
        peak = magnitude > peak ? magnitude : peak;
      }
      atomicMax(&out.peak[feature(entry(slot, 0))], peak);
    }
  }

  __device__ void store_split(const float (&x)[kMmaValues], MmaOperand& out) const {
    if constexpr (kTokens) {
      ZF_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        const float scale = scale_of(out, p);
        const Split s = split_two(x[first(p)] * scale, x[second(p)] * scale);
        put(out.hi, p, s.hi);
        put(out.lo, p, s.lo);
      }
    } else {
      ZF_UNROLL
      for (int p = 0; p < kPairs; p += 4) {  // eight samples of one feature
        const float scale = scale_of(out, p);
        Quad hi, lo;
        ZF_UNROLL
        for (int q = 0; q < 4; ++q) {
          const Split s = split_two(x[first(p + q)] * scale, x[second(p + q)] * scale);
          hi.word[q] = s.hi, lo.word[q] = s.lo;
        }
        *reinterpret_cast<Quad*>(place(out.hi, p)) = hi;
        *reinterpret_cast<Quad*>(place(out.lo, p)) = lo;
      }
    }
  }

 private:
  // Value k of the thread's feature `slot`.
  static __device__ constexpr int entry(int slot, int k) { return kTokens ? kRun * k + slot : kRun * slot + k; }
  // Pair p: samples of an even number and the next.
  static __device__ constexpr int first(int p) { return kTokens ? p / kRun * 2 * kRun + p % kRun : 2 * p; }
  static __device__ constexpr int second(int p) { return first(p) + (kTokens ? kRun : 1); }

  __device__ const scalar_t* pointer(int e) const { return static_cast<const scalar_t*>(from_[feature(e)]); }
  static __device__ bool aligned(const scalar_t* x) { return (reinterpret_cast<uintptr_t>(x) & 15) == 0; }
  template <int kWide>  // words of one access
  static __device__ void load_run(const scalar_t* x, Values& value, int run) {
    struct alignas(4 * kWide) Wide {
      uint32_t word[kWide];
    };
    ZF_UNROLL
    for (int q = 0; q < kRunWords / kWide; ++q) {
      const Wide wide = reinterpret_cast<const Wide*>(x)[q];
      ZF_UNROLL
      for (int w = 0; w < kWide; ++w) value.word[run * kRunWords + kWide * q + w] = wide.word[w];
    }
  }
  __device__ float scale_of(const MmaOperand& out, int p) const {
    return power_of_two(split_exponent(bits_to_float(out.peak[feature(first(p))])));
  }
  __device__ uint16_t* place(uint16_t (*plane)[kMmaSamples], int p) const {
    const int r = feature(first(p)), n = sample(first(p));
    return &plane[r][mma_unit(r, n / 8) * 8 + n % 8];
  }
  __device__ void put(uint16_t (*plane)[kMmaSamples], int p, uint32_t two) const { memcpy(place(plane, p), &two, 4); }

  const MomentsSpace& s_;
  const void* const* from_;
  int feature0_, features_, row_, unit_;
};

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
    ZF_UNROLL
    for (int i = 0; i < 2; ++i) ZF_UNROLL
    for (int j = 0; j < 4; ++j)
      mma_m16n8k16<half_t>(acc[i][j], a_hi[i], b_hi[j / 2][j % 2 * 2], b_hi[j / 2][j % 2 * 2 + 1]);
    if constexpr (kSplit) {
      uint32_t lo[2][4];
      ZF_UNROLL
      for (int j = 0; j < 2; ++j) mma_fragment(lo[j], b.lo, col0 + 16 * j, unit, true);
      ZF_UNROLL
      for (int i = 0; i < 2; ++i) ZF_UNROLL
      for (int j = 0; j < 4; ++j)
        mma_m16n8k16<half_t>(acc[i][j], a_hi[i], lo[j / 2][j % 2 * 2], lo[j / 2][j % 2 * 2 + 1]);
      ZF_UNROLL
      for (int i = 0; i < 2; ++i) mma_fragment(lo[i], a.lo, row0 + 16 * i, unit, false);
      ZF_UNROLL
      for (int i = 0; i < 2; ++i) ZF_UNROLL
      for (int j = 0; j < 4; ++j)
        mma_m16n8k16<half_t>(acc[i][j], lo[i], b_hi[j / 2][j % 2 * 2], b_hi[j / 2][j % 2 * 2 + 1]);
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
    moments_tile_of(local / s.splits, int(moments_side(features)), &row, &col);
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
  const MomentsSpace& s = job.space[moments_space_of(job, blockIdx.x)];
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
