// SPDX-License-Identifier: Apache-2.0
// sparse_linear and its gradients on a GPU: compressed rows, gathered from (Frankle & Carbin 2019, section 2).
//
// Few samples: a warp owns a row and up to 8 samples, its lanes share out the weights, and one sum across the warp ends
// each output.  More samples: they are packed to [columns, batch]; then a lane is a sample, and a warp runs over the
// weights of a row, which it loads 32 at a time and passes around.  The input gradient is the same product with the
// transposed layout, whose values are fetched by `order`.  The weight gradient: a lane per weight, or, on packed
// samples, a warp per weight in turn.  No atomics, each sum in one order: equal on every run.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

constexpr int kTile = 32;

__device__ inline long long column_at(const SparseJob& job, long long i) {
  return job.narrow ? (long long)static_cast<const uint16_t*>(job.column)[i]
                    : (long long)static_cast<const int32_t*>(job.column)[i];
}

template <class scalar_t>
__device__ inline auto value_at(const SparseJob& job, long long i) {
  return widen(static_cast<const scalar_t*>(job.value)[job.order ? (long long)job.order[i] : i]);
}

// Valid in every lane.
template <class acc_t>
__device__ inline acc_t warp_sum(acc_t x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// The row that holds entry i: the last that begins at or before it.
__device__ inline long long row_of(const SparseJob& job, long long i) {
  long long low = 0, high = job.rows - 1;
  while (low < high) {
    const long long middle = (low + high + 1) / 2;
    if (job.row_start[middle] <= i)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class scalar_t, class acc_t>
__device__ inline void write(const SparseJob& job, long long sample, long long row, acc_t sum) {
  if (job.bias) sum += acc_t(widen(static_cast<const scalar_t*>(job.bias)[row]));
  static_cast<scalar_t*>(job.out)[sample * job.rows + row] = narrow<scalar_t>(double(sum));
}

}  // namespace

// from [batch, n] -> to [n, batch], a square tile at a time through shared memory
template <class scalar_t>
__global__ void sparse_linear_pack_kernel(const scalar_t* from, scalar_t* to, long long batch, long long n) {
  __shared__ scalar_t tile[kTile][kTile + 1];
  const long long across = (n + kTile - 1) / kTile;
  const long long column = blockIdx.x % across * kTile, sample = blockIdx.x / across * kTile;
  for (int e = threadIdx.x; e < kTile * kTile; e += blockDim.x) {
    const int s = e / kTile, c = e % kTile;
    if (sample + s < batch && column + c < n) tile[s][c] = from[(sample + s) * n + column + c];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile; e += blockDim.x) {
    const int c = e / kTile, s = e % kTile;
    if (sample + s < batch && column + c < n) to[(column + c) * batch + sample + s] = tile[s][c];
  }
}

// A warp per row and kSamples samples.
template <class scalar_t, int kSamples>
__global__ void sparse_linear_gather_kernel(const __grid_constant__ SparseJob job) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const long long warp = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const long long groups = (job.batch + kSamples - 1) / kSamples, row = warp / groups;
  if (row >= job.rows) return;  // all of the warp
  const long long sample = warp % groups * kSamples;
  const int lane = threadIdx.x % 32;
  const scalar_t* x = static_cast<const scalar_t*>(job.x) + sample * job.columns;
  acc_t sum[kSamples] = {};
  for (long long i = job.row_start[row] + lane; i < job.row_start[row + 1]; i += 32) {
    const long long column = column_at(job, i);
    const acc_t weight = value_at<scalar_t>(job, i);
    ZF_UNROLL
    for (int s = 0; s < kSamples; ++s)
      if (sample + s < job.batch) sum[s] += weight * acc_t(widen(x[s * job.columns + column]));
  }
  ZF_UNROLL
  for (int s = 0; s < kSamples; ++s) {
    const acc_t total = warp_sum(sum[s]);
    if (lane == 0 && sample + s < job.batch) write<scalar_t>(job, sample + s, row, total);
  }
}

// A block per kTile rows and kTile samples: a lane is a sample.
template <class scalar_t>
__global__ void sparse_linear_lanes_kernel(const __grid_constant__ SparseJob job) {
  using acc_t = typename Accumulate<scalar_t>::type;
  __shared__ acc_t tile[kTile][kTile + 1];  // [row][sample]
  const long long down = (job.rows + kTile - 1) / kTile;
  const long long row = blockIdx.x % down * kTile, sample = blockIdx.x / down * kTile;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const long long own = sample + lane < job.batch ? sample + lane : job.batch - 1;  // a lane too many adds in vain
  const scalar_t* x = static_cast<const scalar_t*>(job.packed_x) + own;
  for (int r = threadIdx.x / 32; r < kTile && row + r < job.rows; r += warps) {
    acc_t sum = 0;
    const long long end = job.row_start[row + r + 1];
    for (long long at = job.row_start[row + r]; at < end; at += 32) {
      const int n = end - at < 32 ? int(end - at) : 32;
      const long long mine = at + (lane < n ? lane : 0);
      const acc_t weight = value_at<scalar_t>(job, mine);
      const int column = int(column_at(job, mine));
      for (int k = 0; k < n; ++k) {
        const long long c = __shfl_sync(kFullWarp, column, k);
        sum += __shfl_sync(kFullWarp, weight, k) * acc_t(widen(x[c * job.batch]));
      }
    }
    tile[r][lane] = sum;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile; e += blockDim.x) {
    const int s = e / kTile, r = e % kTile;
    if (sample + s < job.batch && row + r < job.rows) write<scalar_t>(job, sample + s, row + r, tile[r][s]);
  }
}

// A lane per weight: samples as they lie.
template <class scalar_t>
__global__ void sparse_linear_weight_gather_kernel(const __grid_constant__ SparseJob job) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= job.alive) return;
  const scalar_t* grad = static_cast<const scalar_t*>(job.grad) + row_of(job, i);
  const scalar_t* x = static_cast<const scalar_t*>(job.x) + column_at(job, i);
  acc_t sum = 0;
  for (long long s = 0; s < job.batch; ++s) sum += acc_t(widen(grad[s * job.rows])) * acc_t(widen(x[s * job.columns]));
  static_cast<scalar_t*>(job.out)[i] = narrow<scalar_t>(double(sum));
}

// A warp per 32 weights, one after the other: a lane is a sample, and keeps the result of one weight.
template <class scalar_t>
__global__ void sparse_linear_weight_lanes_kernel(const __grid_constant__ SparseJob job) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32 * 32;
  if (first >= job.alive) return;  // all of the warp
  const int lane = threadIdx.x % 32, n = job.alive - first < 32 ? int(job.alive - first) : 32;
  long long row = row_of(job, first);
  acc_t kept = 0;
  for (int k = 0; k < n; ++k) {
    while (job.row_start[row + 1] <= first + k) ++row;  // the entry exists, so that this ends
    const scalar_t* grad = static_cast<const scalar_t*>(job.packed_grad) + row * job.batch;
    const scalar_t* x = static_cast<const scalar_t*>(job.packed_x) + column_at(job, first + k) * job.batch;
    acc_t sum = 0;
    for (long long s = lane; s < job.batch; s += 32) sum += acc_t(widen(grad[s])) * acc_t(widen(x[s]));
    sum = warp_sum(sum);
    if (lane == k) kept = sum;
  }
  if (lane < n) static_cast<scalar_t*>(job.out)[first + lane] = narrow<scalar_t>(double(kept));
}

namespace {

inline unsigned blocks_of(long long work, long long each) { return unsigned((work + each - 1) / each); }

template <class scalar_t>
void pack(const void* from, void* to, long long batch, long long n, cudaStream_t stream) {
  if (n == 0) return;
  const long long tiles = ((n + kTile - 1) / kTile) * ((batch + kTile - 1) / kTile);
  ZF_LAUNCH((sparse_linear_pack_kernel<scalar_t>), unsigned(tiles), unsigned(kSparseThreads), 0, stream,
            static_cast<const scalar_t*>(from), static_cast<scalar_t*>(to), batch, n);
}

template <class scalar_t, int kSamples>
void gather(const SparseJob& job, cudaStream_t stream) {
  const long long warps = job.rows * ((job.batch + kSamples - 1) / kSamples);
  ZF_LAUNCH((sparse_linear_gather_kernel<scalar_t, kSamples>), blocks_of(warps, kSparseThreads / 32),
            unsigned(kSparseThreads), 0, stream, job);
}

}  // namespace

cudaError_t sparse_linear(DType dtype, const SparseJob& job, cudaStream_t stream) {
  if (job.rows == 0 || job.batch == 0) return cudaSuccess;
  dispatch(dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    if (job.batch == 1) return gather<scalar_t, 1>(job, stream);
    if (job.batch <= 4) return gather<scalar_t, 4>(job, stream);
    if (job.batch <= kSparseFew) return gather<scalar_t, 8>(job, stream);
    pack<scalar_t>(job.x, job.packed_x, job.batch, job.columns, stream);
    const long long tiles = ((job.rows + kTile - 1) / kTile) * ((job.batch + kTile - 1) / kTile);
    ZF_LAUNCH((sparse_linear_lanes_kernel<scalar_t>), unsigned(tiles), unsigned(kSparseThreads), 0, stream, job);
  });
  return cudaGetLastError();
}

cudaError_t sparse_linear_weight(DType dtype, const SparseJob& job, cudaStream_t stream) {
  if (job.alive == 0) return cudaSuccess;
  dispatch(dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    const unsigned blocks = blocks_of(job.alive, kSparseThreads), threads = unsigned(kSparseThreads);
    if (job.batch <= kSparseFew) {
      ZF_LAUNCH((sparse_linear_weight_gather_kernel<scalar_t>), blocks, threads, 0, stream, job);
      return;
    }
    pack<scalar_t>(job.x, job.packed_x, job.batch, job.columns, stream);
    pack<scalar_t>(job.grad, job.packed_grad, job.batch, job.rows, stream);
    ZF_LAUNCH((sparse_linear_weight_lanes_kernel<scalar_t>), blocks, threads, 0, stream, job);
  });
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
