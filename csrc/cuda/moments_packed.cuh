// SPDX-License-Identifier: Apache-2.0
// The "wgmma" path of moments_: tensor cores of compute capability 9.0, for many features.
//
// Pack: a block reads 32 features of a group of 256 samples, in any layout, notes bad values, subtracts the shift, adds
// up each row and writes the rows as operands: for every 64 samples an array [padded features][128 bytes] whose 16-byte
// units lie where the 128-byte swizzle wants them, so that any 128 rows are one piece of memory that a bulk copy brings
// into shared memory ready for use.  If the inputs have 16 bits and no feature is shifted, the operands are the inputs
// and their products exact ("plain"); otherwise they are split (split.cuh): high and low halves, three products.
//
// Multiply: persistent clusters of two blocks, a tile each.  One warp copies through a ring of stages, A for its own
// block and half of B for both; two warpgroups hold 64 x 128 accumulators and, beside them, float32 sums: tensor cores
// cut off what they add, so accumulators are emptied into those every 256 samples, or 64 if split.
//
// Sums: parts of split tiles and of the features' sums, added in order.  No atomics but the smallest bad place.  Cost:
// F^2 S multiply-adds, three times that if split; the inputs are read once, operands written once and read from the
// second-level cache F / 256 times.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/moments_pack.cuh"

namespace zipfast::cuda {
namespace packed {

constexpr int kStages = 6, kOperand = kTile * kBlockK * 2;  // bytes of a tile's operand
constexpr int kScales = 2 * kTile * int(sizeof(float));     // of its rows, then of its columns
constexpr int kConsumers = 8,
              kMultiply = (kConsumers + 1) * 32;  // warps that multiply; threads with the one that copies
constexpr int kShared = kStages * (2 * kOperand + kScales) + 2 * kStages * 8 + 1024;  // the last: alignment
constexpr int kColumns = 16, kSumFeatures = 32;

struct alignas(16) Four {
  float value[4];
};

// --- multiply --------------------------------------------------------------------------------------------------------

// One work item as one block of the cluster sees it.
struct Item {
  int space, row, col;  // of the tile, in tiles
  int begin, end;       // groups
  int part;             // which partial result, -1: none, the co-moment itself
  bool shared;          // both tiles of the pair lie in the same columns
  bool idle;            // a pair of one tile: this block computes the other's again and drops it
};

__device__ inline Item item_of(const PackedJob& job, int index, int rank) {
  Item item{};
  item.space = rule::entry_of<&PackedSpace::item>(job.space, job.spaces, index);
  const PackedSpace& s = job.space[item.space];
  const PackedPlan& p = s.plan;
  int pair = index - s.item, split = 0;
  item.part = -1;
  if (pair >= p.whole) {
    item.part = pair - p.whole;
    split = item.part / p.rest();
    pair = p.whole + item.part % p.rest();
  }
  item.begin = int(int64_t(s.groups) * split / (item.part < 0 ? 1 : p.splits));
  item.end = item.part < 0 ? s.groups : int(int64_t(s.groups) * (split + 1) / p.splits);
  item.shared = pair < p.side * p.side / 4;
  if (item.shared) {  // column `col` has (col + 1) / 2 pairs
    item.col = 1;
    while (pair >= (item.col + 1) / 2) pair -= (item.col + 1) / 2, ++item.col;
    item.row = 2 * pair + rank;
  } else {  // tiles on the diagonal of columns 0, 2, 4 ...
    item.row = 4 * (pair - p.side * p.side / 4);
    item.idle = rank == 1 && item.row + 2 >= p.side;
    if (!item.idle) item.row += 2 * rank;
    item.col = item.row;
  }
  return item;
}

#if ZF_HOPPER

// Addresses of the stages in shared memory, and where in their ring a warp is.
struct Ring {
  uint32_t base;
  int stage = 0;
  unsigned phase = 0;
  __device__ uint32_t a(int i) const { return base + i * 2 * kOperand; }
  __device__ uint32_t b(int i) const { return a(i) + kOperand; }
  __device__ uint32_t scales(int i) const { return base + kStages * 2 * kOperand + i * kScales; }
  __device__ uint32_t full(int i) const { return scales(kStages) + i * 8; }
  __device__ uint32_t empty(int i) const { return full(kStages) + i * 8; }
  __device__ int next() {
    const int now = stage;
    if (++stage == kStages) stage = 0, phase ^= 1;
    return now;
  }
};

// A stage may be written again once every consuming warp of both blocks has said so, as half of B comes from the other.
__device__ inline void give_back(const Ring& ring, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 < 2) hopper::barrier_arrive(ring.empty(stage), threadIdx.x % 32);
}

// One thread copies what the consumers of this block, and half of what those of the cluster, will read.
__device__ inline void copy_item(const PackedJob& job, const Item& item, bool plain, int rank, Ring& ring) {
  const PackedSpace& s = job.space[item.space];
  const int halves = plain ? 1 : 2;
  for (int64_t k = int64_t(item.begin) * kBlocksK; k < int64_t(item.end) * kBlocksK; ++k)
    for (int half = 0; half < halves; ++half) {
      const unsigned phase = ring.phase;
      const int stage = ring.next();
      hopper::barrier_wait(ring.empty(stage), phase ^ 1);
      const bool scales = half == 1;
      hopper::barrier_expect(ring.full(stage), kOperand + (item.shared ? kOperand : 0) + (scales ? kScales : 0));
      const unsigned char* image = job.image + image_of(s, half, k);
      hopper::bulk_copy(ring.a(stage), image + item.row * kOperand, kOperand, ring.full(stage));
      if (item.shared)
        hopper::bulk_copy_all(ring.b(stage) + rank * (kOperand / 2),
                              image + item.col * kOperand + rank * (kOperand / 2), kOperand / 2, ring.full(stage), 3);
      if (scales) {
        const float* scale = job.scale + s.scale + k / kBlocksK * s.plan.padded;
        hopper::bulk_copy(ring.scales(stage), scale + item.row * kTile, kScales / 2, ring.full(stage));
        hopper::bulk_copy(ring.scales(stage) + kScales / 2, scale + item.col * kTile, kScales / 2, ring.full(stage));
      }
    }
}

template <class operand_t>
__device__ inline void multiply(float (&acc)[64], uint32_t a, uint32_t b, bool add) {
  const uint64_t left = hopper::matrix_descriptor(a), right = hopper::matrix_descriptor(b);
  ZF_UNROLL
  for (int k = 0; k < kBlockK / 16; ++k)
    hopper::wgmma<operand_t>(acc, left + k * hopper::kStepK, right + k * hopper::kStepK, add || k > 0);
}

// Waits for the next stage of the ring; which it is.
__device__ inline int take(Ring& ring) {
  const unsigned phase = ring.phase;
  const int stage = ring.next();
  hopper::barrier_wait(ring.full(stage), phase);
  return stage;
}

// Both of the following add the products of some groups to `sum`.  Rules: (1) accumulators are read behind
// wgmma_wait<0> only; (2) a stage is given back once the products that read it, or the scales in it, are through. While
// one warpgroup empties its accumulators, the products of the other go on.

// Exact products: 16 sums are cut off between two emptyings.
template <class operand_t>
__device__ inline void add_plain(Ring& ring, bool same, int groups, float (&sum)[64]) {
  const uint32_t half = threadIdx.x / 128 * (kOperand / 2);  // this warpgroup's rows of A
  float acc[64];
  for (int g = 0; g < groups; ++g) {
    int before = 0;
    ZF_UNROLL
    for (int k = 0; k < kBlocksK; ++k) {
      const int stage = take(ring);
      hopper::wgmma_fence();
      multiply<operand_t>(acc, ring.a(stage) + half, same ? ring.a(stage) : ring.b(stage), k > 0);
      hopper::wgmma_commit();
      if (k > 0) {
        hopper::wgmma_wait<1>(acc);
        give_back(ring, before);
      }
      before = stage;
    }
    hopper::wgmma_wait<0>(acc);
    give_back(ring, before);
    ZF_UNROLL
    for (int e = 0; e < 64; ++e) sum[e] += acc[e];
  }
}

// Three products of halves, emptied every 64 samples.  The small ones come first: what is cut off then is as small as
// they are, and only the last four sums lose bits of the result.
__device__ inline void add_split(Ring& ring, const unsigned char* shared, bool same, int groups, float (&sum)[64]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t half = threadIdx.x / 128 * (kOperand / 2);
  float acc[64];
  for (int k = 0; k < groups * kBlocksK; ++k) {
    const int high = take(ring), low = take(ring);
    const uint32_t a = ring.a(high) + half, b = same ? ring.a(high) : ring.b(high);
    hopper::wgmma_fence();
    multiply<Half>(acc, a, same ? ring.a(low) : ring.b(low), false);
    multiply<Half>(acc, ring.a(low) + half, b, true);
    multiply<Half>(acc, a, b, true);
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>(acc);
    give_back(ring, high);
    const float* scales = reinterpret_cast<const float*>(shared + (ring.scales(low) - ring.base));
    const float* row = scales + warp * 16 + lane / 4;
    const float r[2] = {row[0], row[8]};
    ZF_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const float* col = scales + kTile + 8 * j + 2 * (lane % 4);
      const float c[2] = {col[0], col[1]};
      ZF_UNROLL
      for (int e = 0; e < 4; ++e) sum[4 * j + e] += acc[4 * j + e] * r[e / 2] * c[e % 2];
      if (j % 4 == 3) hopper::compiler_barrier();  // eight scales at a time: all of them would cost registers
    }
    give_back(ring, low);
  }
}

// To the upper triangle of the co-moment.  Eight at a time, so that reading them does not wait for writing.
__device__ inline void add_tile(const PackedSpace& s, int64_t features, const Item& item, const float (&sum)[64]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t(item.row) * kTile + warp * 16 + lane / 4;
  const int64_t col0 = int64_t(item.col) * kTile + 2 * (lane % 4);
  ZF_UNROLL
  for (int j = 0; j < kColumns; j += 2) {
    double old[8];
    ZF_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int64_t row = row0 + e / 2 % 2 * 8, col = col0 + (j + e / 4) * 8 + e % 2;
      old[e] = row <= col && col < features ? s.comoment[row * features + col] : 0.0;
    }
    ZF_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int64_t row = row0 + e / 2 % 2 * 8, col = col0 + (j + e / 4) * 8 + e % 2;
      if (row <= col && col < features) s.comoment[row * features + col] = old[e] + double(sum[4 * j + e]);
    }
  }
}

// The tile that will be added to, on its way to the second-level cache while its products are formed.
__device__ inline void prefetch_tile(const PackedSpace& s, int64_t features, const Item& item) {
  for (int r = threadIdx.x % 32; r < kTile; r += 32) {
    const int64_t row = int64_t(item.row) * kTile + r, col = int64_t(item.col) * kTile;
    const int64_t first = row > col ? row : col, last = col + kTile < features ? col + kTile : features;
    if (row >= features || first >= last) continue;
    const uintptr_t from = reinterpret_cast<uintptr_t>(s.comoment + row * features + first) & ~uintptr_t(15);
    const uintptr_t to = reinterpret_cast<uintptr_t>(s.comoment + row * features + last) & ~uintptr_t(15);
    if (to > from) hopper::prefetch(reinterpret_cast<const void*>(from), uint32_t(to - from));
  }
}

template <class scalar_t>
__device__ inline void consume(const PackedJob& job, const unsigned char* shared, Ring ring) {
  const int rank = int(hopper::cluster_rank());
  for (int i = blockIdx.x / 2; i < job.items; i += gridDim.x / 2) {
    const Item item = item_of(job, i, rank);
    const PackedSpace& s = job.space[item.space];
    const bool plain = is_plain<scalar_t>(job, item.space);
    for (int g = item.begin; g < item.end; g += kPackedSums) {
      const int groups = item.end - g < kPackedSums ? item.end - g : kPackedSums;
      float sum[64] = {};
      if (!plain) add_split(ring, shared, !item.shared, groups, sum);
      if constexpr (sizeof(scalar_t) == 2)
        if (plain) add_plain<scalar_t>(ring, !item.shared, groups, sum);
      if (item.idle) continue;
      if (item.part < 0) {
        add_tile(s, job.models * s.size, item, sum);
      } else {
        Four* out = reinterpret_cast<Four*>(job.partial + s.partial + (item.part * 2 + rank) * int64_t(kTile * kTile));
        ZF_UNROLL
        for (int j = 0; j < kColumns; ++j)
          out[j * kThreads + threadIdx.x] = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
      }
    }
  }
}

template <class scalar_t>
__device__ inline void produce(const PackedJob& job, Ring ring) {
  const int rank = int(hopper::cluster_rank());
  for (int i = blockIdx.x / 2; i < job.items; i += gridDim.x / 2) {
    const Item item = item_of(job, i, rank);
    const PackedSpace& s = job.space[item.space];
    if (item.part < 0 && !item.idle) prefetch_tile(s, job.models * s.size, item);
    const bool plain = is_plain<scalar_t>(job, item.space);
    if (threadIdx.x % 32 == 0) copy_item(job, item, plain, rank, ring);
    __syncwarp();
  }
}
#endif

template <class scalar_t>
__global__ void ZF_CLUSTER(2) __launch_bounds__(kMultiply, 1)
    moments_wgmma_kernel(const __grid_constant__ PackedJob job) {
#if ZF_HOPPER
  ZF_DYN_SHARED(unsigned char, raw);
  const uint32_t skip = (1024 - hopper::shared_address(raw) % 1024) % 1024;  // the same in both blocks
  const unsigned char* shared = raw + skip;
  const Ring ring{hopper::shared_address(shared)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(ring.full(i), 1);
      hopper::barrier_init(ring.empty(i), 2 * kConsumers);
    }
    hopper::barrier_init_done();
  }
  hopper::cluster_sync();
  // What all lanes of a warp agree on comes from one of them: the compiler is to see that their branches do not part.
  if (__shfl_sync(kFullWarp, threadIdx.x / 32, 0) < kConsumers)
    consume<scalar_t>(job, shared, ring);
  else
    produce<scalar_t>(job, ring);
  hopper::cluster_sync();  // the other block may still arrive at barriers here
#endif                     // other code is never launched (moments_code)
}

// --- sums ------------------------------------------------------------------------------------------------------------

// A block adds the parts of an eighth of a tile's columns, two by two, or those of 32 features' sums.
__global__ void __launch_bounds__(kThreads) moments_parts_kernel(const __grid_constant__ PackedJob job) {
  const PackedSpace& s = job.space[rule::entry_of<&PackedSpace::sum>(job.space, job.spaces, blockIdx.x)];
  const int64_t features = job.models * s.size;
  const int thread = threadIdx.x, rest = s.plan.splits > 1 ? s.plan.rest() : 0;
  int local = int(blockIdx.x) - s.sum;
  if (local < rest * 2 * kColumns) {
    const int j = local % kColumns, rank = local / kColumns % 2, pair = local / kColumns / 2;
    const Item item = item_of(job, s.item + s.plan.whole + pair, rank);
    if (item.idle) return;
    double sum[4] = {};
    const Four* part = reinterpret_cast<const Four*>(job.partial + s.partial) + j * kThreads + thread;
    ZF_UNROLL
    for (int p = 0; p < s.plan.splits; ++p) {
      const Four v = part[(int64_t(p * rest + pair) * 2 + rank) * (kTile * kTile / 4)];
      ZF_UNROLL
      for (int e = 0; e < 4; ++e) sum[e] += double(v.value[e]);
    }
    ZF_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int64_t row = int64_t(item.row) * kTile + thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8;
      const int64_t col = int64_t(item.col) * kTile + 8 * j + 2 * (thread % 4) + e % 2;
      if (row <= col && col < features) s.comoment[row * features + col] += sum[e];
    }
    return;
  }
  __shared__ double part[kThreads / kSumFeatures][kSumFeatures];
  const int lane = thread % kSumFeatures, first = thread / kSumFeatures;
  const int64_t f = int64_t(local - rest * 2 * kColumns) * kSumFeatures + lane;
  double sum = 0;
  if (f < features)
    for (int g = first; g < s.groups; g += kThreads / kSumFeatures) sum += job.rows[s.rows + g * features + f];
  part[first][lane] = sum;
  __syncthreads();
  if (first == 0 && f < features) {
    for (int i = 1; i < kThreads / kSumFeatures; ++i) sum += part[i][lane];
    s.total[f] += sum;
  }
}

template <class scalar_t>
void launch(const PackedJob& job, cudaStream_t stream) {
  if constexpr (sizeof(scalar_t) == 2)
    ZF_LAUNCH((moments_plain_kernel), unsigned(job.spaces), unsigned(kThreads), 0, stream, job);
  ZF_LAUNCH((moments_pack_kernel<scalar_t>), unsigned(job.pack_blocks), unsigned(kThreads), 0, stream, job);
  const unsigned clusters = unsigned(job.items < kPackedClusters ? job.items : kPackedClusters);
  ZF_LAUNCH_CLUSTER((moments_wgmma_kernel<scalar_t>), 2, 2 * clusters, unsigned(kMultiply), kShared, stream, job);
  ZF_LAUNCH((moments_parts_kernel), unsigned(job.sum_blocks), unsigned(kThreads), 0, stream, job);
}

}  // namespace packed

cudaError_t moments_packed(DType dtype, const PackedJob& job, cudaStream_t stream) {
  if (job.spaces == 0) return cudaSuccess;
  if (dtype == DType::f16)
    packed::launch<Half>(job, stream);
  else if (dtype == DType::bf16)
    packed::launch<BFloat16>(job, stream);
  else
    packed::launch<float>(job, stream);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
