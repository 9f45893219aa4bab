// SPDX-License-Identifier: Apache-2.0
// correlate on a GPU (Stoica et al. 2024, section 4.1): co-moments of many spaces become correlations in one launch.
//
// A block owns one 64 x 64 tile of an upper triangle.  Its co-moments are read once, 16 bytes a thread, and all of them
// are under way before the first is used; meanwhile 128 threads form mean and 1 / deviation of the tile's rows and
// columns from the diagonal, which costs less than a launch of its own.  Results go out twice: as they are, from
// registers (a warp writes whole rows of the tile), and turned, through shared memory.  Written once and read once: 8
// bytes of each a pair.  This file is compiled without fused multiply-add: the bits of the C++ kernel.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

constexpr int kTile = kCorrelateTile, kWarps = kCorrelateThreads / 32, kRows = kTile / kWarps;

struct alignas(16) Given {
  double left, right;
};
template <class scalar_t>
struct alignas(2 * sizeof(scalar_t)) Two {
  scalar_t left, right;
};
template <class scalar_t>
struct alignas(16) Unit {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t value[kSize];
};

// Where (row, column) of the turned tile lies, in elements: units of 16 bytes are permuted within a row, so that the
// threads of a warp meet different banks both when they own columns of the tile (writing) and rows (reading).
template <class scalar_t>
__device__ inline int turned_place(int row, int column) {
  constexpr int kSize = Unit<scalar_t>::kSize;
  return row * kTile + (column / kSize ^ (row / 2 & 7)) * kSize + column % kSize;
}

// Co-moments of a pair of features above the diagonal, 0 elsewhere.
__device__ inline double given_at(const CorrelateSpace& s, int i, int j) {
  return i < j && j < s.n ? s.comoment[(long long)i * s.n + j] : 0;
}

}  // namespace

__global__ void correlate_begin_kernel(const __grid_constant__ CorrelateBegin job) {
  for (long long s = threadIdx.x; s < job.spaces; s += blockDim.x) {
    long long* status = job.status + s * rule::kCorrelateFields;
    status[rule::kFeatureAt] = status[rule::kPairAt] = rule::kAllFinite;
    status[rule::kAliveCount] = 0;
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kCorrelateThreads, 3)
    correlate_tile_kernel(const __grid_constant__ CorrelateJob job) {
  __shared__ Unit<scalar_t> unit[kTile * kTile / Unit<scalar_t>::kSize];
  __shared__ double mean[2 * kTile], inverse[2 * kTile], value[2 * kTile];  // of the rows, then of the columns

  scalar_t* turned = unit[0].value;

  const CorrelateSpace& s = job.space[rule::entry_of<&CorrelateSpace::block>(job.space, job.spaces, blockIdx.x)];
  const int n = s.n, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int tile_row, tile_column;
  rule::triangle_tile((n + kTile - 1) / kTile, int(blockIdx.x) - s.block, &tile_row, &tile_column);
  const bool diagonal = tile_row == tile_column, aligned = s.aligned;
  const int row = tile_row * kTile, column = tile_column * kTile;
  const int own = warp * kRows;                      // rows of the tile that this warp owns: this and the following
  const int left = aligned ? 2 * lane : lane;        // columns of the tile that this thread owns: neighbours where a
  const int right = aligned ? left + 1 : lane + 32;  // load takes both, else those that make a warp's loads coalesced

  double given[2][kRows];
  if (aligned) {
    ZF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = row + own + r, j = column + left;
      Given both{0, 0};
      if (i <= j && j < n) both = *reinterpret_cast<const Given*>(s.comoment + (long long)i * n + j);  // n is even
      given[0][r] = both.left, given[1][r] = both.right;
    }
  } else {
    ZF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      given[0][r] = given_at(s, row + own + r, column + left);
      given[1][r] = given_at(s, row + own + r, column + right);
    }
  }

  bool dead = false;
  if (thread < 2 * kTile) {
    const int i = thread < kTile ? row + thread : column + thread - kTile;
    rule::Spread f{0, 0, 0, true};
    if (i < n) f = rule::spread(s.comoment[(long long)i * (n + 1)], s.total[i], s.shift[i], s.share);
    mean[thread] = f.mean, inverse[thread] = f.inverse, value[thread] = f.value;
    dead = f.inverse == 0;
    if (diagonal && thread < kTile) {
      const unsigned alive = __ballot_sync(kFullWarp, !dead);
      if (lane == 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(s.status + rule::kAliveCount),
                  static_cast<unsigned long long>(__popc(alive)));
      if (!f.finite) atomicMin(s.status + rule::kFeatureAt, (long long)i);
      if (i < n)
        static_cast<scalar_t*>(s.out)[(long long)i * (n + 1)] = f.finite ? scalar_t(dead ? 0 : 1) : scalar_t(NAN);
    }
  }
  const bool pairing = __syncthreads_or(dead) && job.pair_dead;  // also: mean, inverse and value are written

  scalar_t found[2][kRows];
  int bad = kTile * kTile;  // the first place in the tile that is not finite
  const double mean_j[2] = {mean[kTile + left], mean[kTile + right]};
  const double inverse_j[2] = {inverse[kTile + left], inverse[kTile + right]};
  ZF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int i = own + r;
    const double mean_i = mean[i], inverse_i = inverse[i];
    ZF_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int j = h ? right : left;
      double x =
          rule::correlation(rule::raw_correlation(given[h][r], s.share, mean_i, mean_j[h], inverse_i, inverse_j[h]));
      if (!(x == x)) {
        if (row + i < column + j) bad = min(bad, i * kTile + j);
      } else if (pairing && inverse_i == 0 && inverse_j[h] == 0 && rule::same_constant(value[i], value[kTile + j])) {
        x = 1;
      }
      found[h][r] = scalar_t(x);
    }
  }
  if (bad < kTile * kTile)
    atomicMin(s.status + rule::kPairAt, (long long)(row + bad / kTile) * n + column + bad % kTile);

  scalar_t* out = static_cast<scalar_t*>(s.out);
  // Else element by element.  Beside the diagonal all rows of a tile are there, as there are columns beyond them.
  const bool whole = aligned && !diagonal;
  if (whole) {
    ZF_UNROLL
    for (int r = 0; r < kRows; ++r)
      if (column + left < n)
        *reinterpret_cast<Two<scalar_t>*>(out + (long long)(row + own + r) * n + column + left) =
            Two<scalar_t>{found[0][r], found[1][r]};
  }

  // Turned: a thread's rows are neighbours there.
  constexpr int kSize = Unit<scalar_t>::kSize;
  ZF_UNROLL
  for (int h = 0; h < 2; ++h) {
    ZF_UNROLL
    for (int first = 0; first < kRows; first += kSize) {
      Unit<scalar_t> some;
      ZF_UNROLL
      for (int k = 0; k < kSize; ++k) some.value[k] = found[h][first + k];
      *reinterpret_cast<Unit<scalar_t>*>(turned + turned_place<scalar_t>(h ? right : left, own + first)) = some;
    }
  }
  __syncthreads();
  if (whole) {
    constexpr int kUnits = kTile / kSize;  // of a row
    ZF_UNROLL
    for (int at = 0; at < kTile * kUnits / kCorrelateThreads; ++at) {
      const int e = at * kCorrelateThreads + thread, j = e / kUnits, i = e % kUnits * kSize;
      if (column + j < n)
        *reinterpret_cast<Unit<scalar_t>*>(out + (long long)(column + j) * n + row + i) =
            *reinterpret_cast<const Unit<scalar_t>*>(turned + turned_place<scalar_t>(j, i));
    }
  } else {
    for (int e = thread; e < kTile * kTile; e += kCorrelateThreads) {
      const int j = e / kTile, i = e % kTile;
      if (row + i < column + j && column + j < n)
        out[(long long)(column + j) * n + row + i] = turned[turned_place<scalar_t>(j, i)];
      if (row + j < column + i && column + i < n)  // the other way: here j is the row
        out[(long long)(row + j) * n + column + i] = turned[turned_place<scalar_t>(i, j)];
    }
  }
}

cudaError_t correlate_begin(const CorrelateBegin& job, cudaStream_t stream) {
  ZF_LAUNCH((correlate_begin_kernel), 1u, 64u, 0, stream, job);
  return cudaGetLastError();
}

cudaError_t correlate(DType dtype, const CorrelateJob& job, cudaStream_t stream) {
  if (job.blocks == 0) return cudaSuccess;
  if (dtype == DType::f64)
    ZF_LAUNCH((correlate_tile_kernel<double>), unsigned(job.blocks), unsigned(kCorrelateThreads), 0, stream, job);
  else
    ZF_LAUNCH((correlate_tile_kernel<float>), unsigned(job.blocks), unsigned(kCorrelateThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
