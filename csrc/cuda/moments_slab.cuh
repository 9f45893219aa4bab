// SPDX-License-Identifier: Apache-2.0
// Features on their way to tensor cores (path "mma", moments_mma.cuh): 64 features x 64 samples from where they lie in
// memory, through registers, into shared memory as float16 operands.  Loads are issued a chunk ahead, so that they run
// under the products; what a thread holds is chosen so that both sides move 16 bytes at a time where alignment allows.
#pragma once
#include "cuda/launch.h"
#include "cuda/scope.cuh"
#include "cuda/split.cuh"

namespace zipfast::cuda {

constexpr int kMmaSamples = 64, kMmaThreads = 128, kMmaValues = kMomentsTile * kMmaSamples / kMmaThreads;
constexpr int kMmaUnits = kMmaSamples / 8;  // of 16 bytes in a row
static_assert(kMomentsTile == 64);

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

// What a thread holds of 64 features x 64 samples, 32 values in runs of 8 that lie side by side in memory.
//   images (inner > 1)   run i is of feature thread / 8 + 16 i, samples 8 (thread % 8) and the next
//   tokens (inner == 1)  run i is of sample 2 (thread / 8) + 32 (i / 2) + i % 2, features 8 (thread % 8) and the next
// Two samples of one feature, which make a word of an operand, are then neighbours in a run, or equal places of two
// runs.
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

}  // namespace zipfast::cuda
