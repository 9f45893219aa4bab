// SPDX-License-Identifier: Apache-2.0
// What threshold's kernels share, keys eight at a time, and the bracket around the rank.
#pragma once
#include <type_traits>

#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

constexpr int kBins = rule::kThresholdBins, kSpan = kThresholdSpan, kList = kThresholdCandidates;
constexpr int kMaskByte = 8;           // weights that one byte of a mask speaks of
constexpr int kStep = 32 * kMaskByte;  // elements that a warp looks at together
constexpr int kSample = kThresholdWide * kThresholdSamples, kWideWarps = kThresholdWide / 32;
constexpr int kFinishWarps = kThresholdFinish / 32;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kSpan % kStep == 0 && kSpan <= 65536, "a place has 16 bits");
static_assert(kBins % kThresholdWide == 0 && kBins % kThresholdFinish == 0);
static_assert(kList % 32 == 0 && kThresholdWide <= 1024);

template <class key_t>
struct alignas(16) Pack {
  key_t value[16 / sizeof(key_t)];
};

__device__ inline unsigned mask_byte(const uint8_t* mask, long long at) { return mask ? mask[at / kMaskByte] : 0xffu; }
__device__ inline unsigned lane_id() { return threadIdx.x % 32; }
__device__ inline unsigned earlier_lanes() { return (1u << lane_id()) - 1; }

// Pointers that come out of memory could lead anywhere: with this the compiler takes the shorter way to global memory.
template <class T>
__device__ inline T* in_global(T* p) {
#ifndef ZF_EMU
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Valid in every lane, of what the lanes before it have; all lanes call it.
struct Before {
  unsigned own, total;
};
__device__ inline Before warp_before(unsigned own) {  // own <= 15
  Before b{0, 0};
  ZF_UNROLL
  for (int bit = 0; bit < 4; ++bit) {
    const unsigned has = __ballot_sync(kFullWarp, own >> bit & 1);
    b.own += unsigned(__popc(has & earlier_lanes())) << bit, b.total += unsigned(__popc(has)) << bit;
  }
  return b;
}
template <class T>
__device__ inline T warp_total(T own) {
  ZF_UNROLL
  for (int step = 16; step > 0; step >>= 1) own += __shfl_xor_sync(kFullWarp, own, step);
  return own;
}
// The same over the threads of a block.  `scratch` holds a number for each warp; contains two barriers.
template <int kThreads, class T>
__device__ inline T block_before(T own, T* scratch, T* total) {
  T until = own;
  ZF_UNROLL
  for (int step = 1; step < 32; step <<= 1) {
    const T other = __shfl_up_sync(kFullWarp, until, step);
    if (int(lane_id()) >= step) until += other;
  }
  if (lane_id() == 31) scratch[threadIdx.x / 32] = until;
  __syncthreads();
  T before = until - own, all = 0;
  for (unsigned w = 0; w < kThreads / 32; ++w) {
    if (w < threadIdx.x / 32) before += scratch[w];
    all += scratch[w];
  }
  __syncthreads();  // the scratch may be written again
  *total = all;
  return before;
}

// Key bits and one more than any key.
struct Keys {
  int bits;
  long long end;
};
__device__ inline Keys keys_of(uint8_t dtype) {
  switch (DType(dtype)) {
    case DType::f64:
      return {rule::Magnitude<double>::kBits, rule::Magnitude<double>::kNan + 1};
    case DType::f16:
      return {rule::Magnitude<Half>::kBits, rule::Magnitude<Half>::kNan + 1};
    case DType::bf16:
      return {rule::Magnitude<BFloat16>::kBits, rule::Magnitude<BFloat16>::kNan + 1};
    default:
      return {rule::Magnitude<float>::kBits, rule::Magnitude<float>::kNan + 1ll};
  }
}

// Calls f with a null pointer of the storage type.
template <class F>
__device__ inline void each_narrow(uint8_t dtype, F&& f) {
  if (DType(dtype) == DType::f16)
    f(static_cast<Half*>(nullptr));
  else if (DType(dtype) == DType::bf16)
    f(static_cast<BFloat16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}
template <class F>
__device__ inline void each_dtype(uint8_t dtype, F&& f) {
  if (DType(dtype) == DType::f64)
    f(static_cast<double*>(nullptr));
  else
    each_narrow(dtype, f);
}
// The same where it is known which of the two a candidate's type goes with.
template <class rest_t, class F>
__device__ inline void each_dtype_of(uint8_t dtype, F&& f) {
  if constexpr (sizeof(rest_t) == 8)
    f(static_cast<double*>(nullptr));
  else
    each_narrow(dtype, f);
}
template <class T>
using Pointee = std::remove_pointer_t<T>;

__device__ inline bool alive_at(const ThresholdTensor& t, long long at) {
  return !t.mask || (in_global(t.mask)[at >> 3] >> (at & 7) & 1);
}

template <class scalar_t>
__device__ inline typename rule::Magnitude<scalar_t>::key_t key_at(const ThresholdTensor& t, long long at) {
  using key_t = typename rule::Magnitude<scalar_t>::key_t;
  return rule::magnitude_key<scalar_t>(in_global(static_cast<const key_t*>(t.data))[at]);
}

// Calls f(first of eight elements, their survivors, their keys) in every lane, for all elements of a span in order; a
// lane behind the end has no survivors.  `kFlight`: steps that are loaded before the first is used.
template <class scalar_t, int kFlight, class F>
__device__ inline void each_eight(const ThresholdTensor& t, long long begin, long long end, F&& f) {
  using key_t = typename rule::Magnitude<scalar_t>::key_t;
  constexpr int kPack = 16 / sizeof(key_t), kPacks = kMaskByte / kPack;
  const key_t* data = in_global(static_cast<const key_t*>(t.data));
  const uint8_t* mask = in_global(t.mask);
  for (long long from = begin; from < end; from += kFlight * kStep) {
    Pack<key_t> pack[kFlight][kPacks];
    unsigned alive[kFlight];
    const long long own = from + lane_id() * kMaskByte;
    if (t.aligned && from + kFlight * kStep <= end) {
      ZF_UNROLL
      for (int u = 0; u < kFlight; ++u) alive[u] = mask_byte(mask, own + u * kStep);
      ZF_UNROLL
      for (int u = 0; u < kFlight; ++u) {
        const auto* from_here = reinterpret_cast<const Pack<key_t>*>(data + own + u * kStep);
        ZF_UNROLL
        for (int p = 0; p < kPacks; ++p) {
          pack[u][p] = Pack<key_t>{};
          if (alive[u]) pack[u][p] = from_here[p];  // eight dead weights of 4 bytes are a sector that nobody asks for
        }
      }
    } else {
      ZF_UNROLL
      for (int u = 0; u < kFlight; ++u) {
        const long long at = own + u * kStep, left = end - at;
        alive[u] = left <= 0 ? 0 : mask_byte(mask, at) & (left < kMaskByte ? (1u << left) - 1 : 0xffu);
        ZF_UNROLL
        for (int e = 0; e < kMaskByte; ++e)
          pack[u][e / kPack].value[e % kPack] = alive[u] >> e & 1 ? data[at + e] : key_t(0);
      }
    }
    ZF_UNROLL
    for (int u = 0; u < kFlight; ++u) {
      key_t key[kMaskByte];
      ZF_UNROLL
      for (int e = 0; e < kMaskByte; ++e) key[e] = rule::magnitude_key<scalar_t>(pack[u][e / kPack].value[e % kPack]);
      f(own + u * kStep, alive[u], key);
    }
  }
}

// The row of the table that has a piece; valid in every lane, all lanes call it.
__device__ inline int row_at(const ThresholdJob& job, int piece) {
  for (int low = 0, step = (job.rows + 31) / 32;; step = (step + 31) / 32) {
    const int at = low + int(lane_id()) * step;
    const unsigned found = __ballot_sync(kFullWarp, at < job.rows && job.table[at].first <= piece);
    low += (__popc(found) - 1) * step;
    if (step == 1) return low;
  }
}

// --- begin: the bracket

// A place in each of kSample steps of one length, off by another part of the step, so that no row length meets always
// one column.  Small groups are sampled whole.
__device__ inline long long sample_at(long long size, long long i) {
  if (size <= kSample) return i;
  return i * size / kSample + (long long)((uint32_t(i) * 2654435769u * (unsigned long long)(size / kSample)) >> 32);
}

// Rule 1: where low <= key of rank k < high, the bracket finds it; else digits of all do.  One block a group.
__device__ inline void bracket_group(const ThresholdJob& job, int g) {
  __shared__ unsigned bin[2][kBins];
  __shared__ int scratch[kWideWarps];
  __shared__ int found[2], rest[2];
  constexpr int kOwn = kBins / kThresholdWide, kBatch = kThresholdSamples < 8 ? kThresholdSamples : 8;
  ThresholdGroup& group = job.state[g];
  for (int b = threadIdx.x; b < kBins; b += kThresholdWide) job.bin[(long long)g * kBins + b] = 0;
  if (threadIdx.x == 0) job.total[g] = ThresholdTotal{};
  const int rows = group.tensors;
  const ThresholdTensor* table = job.table + group.tensor;
  if (rows == 0) {
    if (threadIdx.x == 0) job.status[job.inputs + g] = 0, group.pieces = 0;
    return;
  }
  const ThresholdTensor& end = table[rows - 1];
  const long long size = end.before + end.size, k = group.drop < size ? group.drop : size;
  if (threadIdx.x == 0) {
    group.size = size, group.dtype = table[0].dtype;
    group.piece = table[0].first;
    group.pieces = end.first + int((end.size + kThresholdPiece - 1) / kThresholdPiece) - group.piece;
  }
  const Keys keys = keys_of(table[0].dtype);
  const int kept = keys.bits < 31 ? keys.bits : 31, cut = keys.bits - kept;  // of float64 the upper half will do
  const int wanted = size < kSample ? int(size) : kSample;

  unsigned key[kThresholdSamples];
  int own = 0, row = 0;
  const int first = threadIdx.x * kThresholdSamples;
  if (first < wanted) {
    const long long at = sample_at(size, first);
    for (int high = rows - 1; row < high;) {
      const int middle = (row + high + 1) / 2;
      if (table[middle].before <= at)
        row = middle;
      else
        high = middle - 1;
    }
  }
  each_dtype(table[0].dtype, [&](auto* type) {
    using M = rule::Magnitude<Pointee<decltype(type)>>;
    using raw_t = std::conditional_t<sizeof(typename M::key_t) == 8, int32_t, typename M::key_t>;
    constexpr int kWords = sizeof(typename M::key_t) / sizeof(raw_t), kCut = kWords == 2 ? 32 : 0;
    // All loads of a batch are on their way before the first is looked at.
    ZF_UNROLL
    for (int batch = 0; batch < kThresholdSamples; batch += kBatch) {
      raw_t raw[kBatch];
      uint8_t byte[kBatch];
      unsigned bits = 0;
      ZF_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        raw[i] = 0, byte[i] = 0;
        if (first + batch + i >= wanted || k == 0) continue;
        long long at = sample_at(size, first + batch + i);
        while (row + 1 < rows && table[row + 1].before <= at) ++row;
        at -= table[row].before;
        raw[i] = in_global(static_cast<const raw_t*>(table[row].data))[at * kWords + kWords - 1];
        byte[i] = uint8_t(mask_byte(in_global(table[row].mask), at));
        bits |= unsigned(at & 7) << 3 * i;
      }
      ZF_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const bool has = byte[i] >> (bits >> 3 * i & 7) & 1;
        const raw_t top = raw_t(raw[i] & raw_t(M::kSign >> kCut)), nan = raw_t(M::kNan >> kCut);
        key[batch + i] = has ? unsigned(top < nan ? top : nan) : kAll;
        own += has;
      }
    }
  });
  int alive, total;
  block_before<kThresholdWide>(own, scratch, &alive);

  // The k-th of all survivors is expected where k of all elements are.
  const double share = double(k) / double(size), mean = share * wanted;
  const double apart = kThresholdSigmas * sqrt(mean * (1 - share)) + kThresholdSlack;
  int left = int(floor(mean - apart)), right = int(ceil(mean + apart));
  if (size <= kSample) left = right = int(k < alive ? k : alive) - 1;
  int rank[2] = {left < alive ? left : alive - 1, right};
  unsigned prefix[2] = {0, 0};
  const bool look[2] = {rank[0] >= 0, right >= 0 && right < alive};
  if (look[0] || look[1])
    for (int pass = 0; pass < rule::threshold_passes(kept); ++pass) {
      const int shift = rule::threshold_shift(kept, pass);
      const int top = pass ? rule::threshold_shift(kept, pass - 1) : kept;
      const bool apart_now = prefix[0] != prefix[1];
      for (int b = threadIdx.x; b < 2 * kBins; b += kThresholdWide) bin[b / kBins][b % kBins] = 0;
      __syncthreads();
      ZF_UNROLL
      for (int i = 0; i < kThresholdSamples; ++i) {
        if (key[i] == kAll) continue;
        const unsigned digit = key[i] >> shift & ((1u << (top - shift)) - 1);
        if (key[i] >> top == prefix[0]) atomicAdd(&bin[0][digit], 1u);
        if (apart_now && key[i] >> top == prefix[1]) atomicAdd(&bin[1][digit], 1u);
      }
      __syncthreads();
      ZF_UNROLL
      for (int j = 0; j < 2; ++j) {
        const unsigned* mine = bin[apart_now ? j : 0] + threadIdx.x * kOwn;
        int sum = 0;
        for (int b = 0; b < kOwn; ++b) sum += int(mine[b]);
        int before = block_before<kThresholdWide>(sum, scratch, &total);
        for (int b = 0; b < kOwn; ++b) {
          const int here = int(mine[b]);
          if (rank[j] >= before && rank[j] < before + here)
            found[j] = threadIdx.x * kOwn + b, rest[j] = rank[j] - before;
          before += here;
        }
      }
      __syncthreads();
      ZF_UNROLL
      for (int j = 0; j < 2; ++j)
        if (look[j]) prefix[j] = prefix[j] << (top - shift) | unsigned(found[j]), rank[j] = rest[j];
    }
  if (threadIdx.x == 0) {
    const long long high = look[1] ? (prefix[1] + 1ll) << cut : keys.end;
    group.low = k && look[0] ? (long long)prefix[0] << cut : 0;
    group.high = k == 0 ? 0 : high < keys.end ? high : keys.end;
  }
}

}  // namespace

}  // namespace zipfast::cuda
