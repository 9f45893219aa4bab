// SPDX-License-Identifier: Apache-2.0
// moments_ on a GPU: co-moments of many spaces in one launch, straight from the feature tensors.
//
// A block owns one 64 x 64 tile of the upper triangle of one space and one part of the samples ("split"); tiles and
// splits follow from the shape alone, and the parts are added in a fixed order by a second kernel, so no atomics and
// equal bits on every run.  16 samples at a time go through shared memory, shifted and widened; a thread forms a 4 x 4
// piece in registers. float32 registers are flushed into float64 ones every 256 samples: products of float16 and
// bfloat16 are exact, and the rounding of the sums stays near 1e-7. Cost: S F^2 / 2 multiply-adds; every tile row reads
// its features once (F / 64 times in all, from the second-level cache where the slab fits).  This generic path runs on
// every device and in the emulator.
#include "cuda/scope.cuh"
#include "cuda/launch.h"
#include "cuda/moments_mma.cuh"
#include "cuda/moments_packed.cuh"

namespace zipfast::cuda {
namespace {

constexpr int kTile = kMomentsTile, kStep = 16, kSide = 16, kPiece = kTile / kSide, kThreads = kSide * kSide;
constexpr int kFlush = 256;
static_assert(kFlush % kStep == 0);

// The first bad value of a model is the smallest (seen + sample) * size + feature.
__device__ inline void note_bad(const MomentsSpace& s, int64_t f, int64_t sample) {
  atomicMin(s.bad + f / s.size, (long long)((s.seen + sample) * s.size + f % s.size));
}

// shared[k][r] = x(sample0 + k, feature0 + r) - shift, zero beyond the ends; [kStep][kTile + 1].  With `note`, values
// that are not finite are noted (before the shift, which may overflow).
template <class scalar_t, class acc_t>
__device__ inline void load_slab(const MomentsJob& job, const MomentsSpace& s, int64_t feature0, int64_t sample0,
                                 int64_t sample1, bool note, acc_t (*shared)[kTile + 1]) {
  const int64_t features = job.models * s.size;
  for (int i = threadIdx.x; i < kStep * kTile; i += kThreads) {
    // Neighbouring threads read neighbouring addresses: samples of an image, or features of a token.
    const int k = s.inner == 1 ? i / kTile : i % kStep, r = s.inner == 1 ? i % kTile : i / kStep;
    const int64_t f = feature0 + r, n = sample0 + k;
    acc_t v = 0;
    if (f < features && n < sample1) {
      const scalar_t* x = static_cast<const scalar_t*>(job.x[s.pointer + f / s.size]);
      const acc_t value = widen(x[(n / s.inner * s.size + f % s.size) * s.inner + n % s.inner]);
      if (note && !(value - value == 0)) note_bad(s, f, n);
      v = value - acc_t(s.shift[f]);
    }
    shared[k][r] = v;
  }
}

template <class scalar_t, class acc_t>
__global__ void __launch_bounds__(kThreads) moments_tile_kernel(const __grid_constant__ MomentsJob job) {
  __shared__ acc_t a[kStep][kTile + 1], b[kStep][kTile + 1];
  const MomentsSpace& s = job.space[rule::entry_of<&MomentsSpace::block>(job.space, job.spaces, blockIdx.x)];
  const int64_t features = job.models * s.size, samples = s.outer * s.inner;
  const int local = blockIdx.x - s.block, split = local % s.splits, tile = local / s.splits;
  int tile_row, tile_col;
  rule::triangle_tile(int(moments_side(features)), tile, &tile_row, &tile_col);
  const bool diagonal = tile_row == tile_col;
  const int64_t row0 = int64_t(tile_row) * kTile, col0 = int64_t(tile_col) * kTile;
  const int64_t begin = samples * split / s.splits, end = samples * (split + 1) / s.splits;
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;

  double sum[kPiece][kPiece] = {}, total = 0;
  for (int64_t n0 = begin; n0 < end; n0 += kFlush) {
    acc_t acc[kPiece][kPiece] = {};
    const int64_t n1 = n0 + kFlush < end ? n0 + kFlush : end;
    for (int64_t n = n0; n < n1; n += kStep) {
      load_slab<scalar_t>(job, s, row0, n, n1, diagonal, a);
      if (!diagonal) load_slab<scalar_t>(job, s, col0, n, n1, false, b);
      __syncthreads();
      if (diagonal && threadIdx.x < kTile && row0 + threadIdx.x < features)
        for (int k = 0; k < kStep; ++k) total += double(a[k][threadIdx.x]);
      const acc_t(*other)[kTile + 1] = diagonal ? a : b;
      for (int k = 0; k < kStep; ++k) {
        acc_t av[kPiece], bv[kPiece];
        ZF_UNROLL
        for (int i = 0; i < kPiece; ++i) av[i] = a[k][ty + i * kSide], bv[i] = other[k][tx + i * kSide];
        ZF_UNROLL
        for (int i = 0; i < kPiece; ++i) ZF_UNROLL
        for (int j = 0; j < kPiece; ++j) acc[i][j] += av[i] * bv[j];
      }
      __syncthreads();  // the slabs may be overwritten
    }
    ZF_UNROLL
    for (int i = 0; i < kPiece; ++i) ZF_UNROLL
    for (int j = 0; j < kPiece; ++j) sum[i][j] += double(acc[i][j]);
  }

  double* partial = s.splits > 1 ? job.partial + s.partial + local * moments_partial(MomentsPath::generic) : nullptr;
  ZF_UNROLL
  for (int i = 0; i < kPiece; ++i) ZF_UNROLL
  for (int j = 0; j < kPiece; ++j) {
    const int r = ty + i * kSide, c = tx + j * kSide;
    if (partial)
      partial[kTile + r * kTile + c] = sum[i][j];
    else if (row0 + r <= col0 + c && col0 + c < features)
      s.comoment[(row0 + r) * features + col0 + c] += sum[i][j];
  }
  if (diagonal && threadIdx.x < kTile && row0 + threadIdx.x < features) {
    if (partial)
      partial[threadIdx.x] = total;
    else
      s.total[row0 + threadIdx.x] += total;
  }
}

// Adds the parts of spaces with several splits.  A block has 32 entries of one tile, a warp every eighth part of them;
// the eight sums are added in order.
template <class part_t>
__global__ void __launch_bounds__(kThreads)
    moments_reduce_kernel(const __grid_constant__ MomentsJob job, int64_t stride) {
  constexpr int kWidth = kMomentsReduceWidth, kGroups = kThreads / kWidth;
  __shared__ double sums[kGroups][kWidth];
  // A space without parts has no blocks: the one after it begins where it does, and is the last of the two.
  const MomentsSpace& s = job.space[rule::entry_of<&MomentsSpace::reduce>(job.space, job.spaces, blockIdx.x)];
  const int local = blockIdx.x - s.reduce, tile = local / kMomentsReduce, lane = threadIdx.x % kWidth;
  const int entry = local % kMomentsReduce * kWidth + lane, group = threadIdx.x / kWidth;
  const int64_t features = job.models * s.size;
  int tile_row, tile_col;
  rule::triangle_tile(int(moments_side(features)), tile, &tile_row, &tile_col);
  const bool product = entry >= kTile;  // else the sum of a feature
  const int e = product ? entry - kTile : entry;
  const int64_t row = int64_t(tile_row) * kTile + (product ? e / kTile : e),
                col = int64_t(tile_col) * kTile + e % kTile;
  const bool wanted = product ? row <= col && col < features : tile_row == tile_col && row < features;
  double sum = 0;
  if (wanted) {
    const double* part = job.partial + s.partial + int64_t(tile) * s.splits * stride;
    for (int p = group; p < s.splits; p += kGroups) {
      const double* own = part + p * stride;
      sum += product ? double(reinterpret_cast<const part_t*>(own + kTile)[e]) : own[e];
    }
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group > 0 || !wanted) return;
  for (int g = 1; g < kGroups; ++g) sum += sums[g][lane];
  if (product)
    s.comoment[row * features + col] += sum;
  else
    s.total[row] += sum;
}

}  // namespace

MomentsCode moments_code(int capability) {
#ifdef ZF_EMU
  return {capability >= 80, capability == 90};
#else
  // Code made for an older generation has neither instructions of this one nor the clusters of path wgmma.
  cudaFuncAttributes mma{}, wgmma{};
  const bool asked = cudaFuncGetAttributes(&mma, moments_mma_kernel<Half>) == cudaSuccess &&
                     cudaFuncGetAttributes(&wgmma, packed::moments_wgmma_kernel<Half>) == cudaSuccess;
  if (!asked) {
    (void)cudaGetLastError();
    return {false, false};
  }
  return {capability >= 80 && mma.ptxVersion >= 80, capability == 90 && wgmma.requiredClusterWidth == 2};
#endif
}

cudaError_t moments(DType dtype, MomentsPath path, const MomentsJob& job, cudaStream_t stream) {
  if (job.blocks == 0) return cudaSuccess;
  dispatch(dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    using acc_t = typename Accumulate<scalar_t>::type;
    if constexpr (!std::is_same<scalar_t, double>::value) {
      if (path == MomentsPath::mma) {
        ZF_LAUNCH((moments_mma_kernel<scalar_t>), unsigned(job.blocks), unsigned(kMmaThreads), 0, stream, job);
        return;
      }
    }
    ZF_LAUNCH((moments_tile_kernel<scalar_t, acc_t>), unsigned(job.blocks), unsigned(kThreads), 0, stream, job);
  });
  const int64_t stride = moments_partial(path);
  const unsigned blocks = unsigned(job.reduce_blocks), threads = unsigned(kThreads);
  if (blocks == 0) return cudaGetLastError();
  if (path == MomentsPath::mma)
    ZF_LAUNCH((moments_reduce_kernel<float>), blocks, threads, 0, stream, job, stride);
  else
    ZF_LAUNCH((moments_reduce_kernel<double>), blocks, threads, 0, stream, job, stride);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
