// SPDX-License-Identifier: Apache-2.0
// sparse_linear and its gradients on a GPU: compressed rows, gathered from (Frankle & Carbin 2019, section 2).
//
// Few samples: a warp owns a row and up to 8 samples, its lanes share out the weights, and one sum across the warp ends
// each output.  More samples: they are packed to [columns, batch]; then a lane is a sample, and a warp runs over the
// weights of a row, which it loads 32 at a time and passes around.  Few samples and rows that are worth it: the staged
// path, which keeps the input in shared memory and reads 8 weights and columns at a time.  The input gradient is the
// same product with the transposed layout, whose values are fetched by `order`.  The weight gradient: a lane per
// weight, or, on packed samples, a warp per weight in turn.  No atomics, each sum in one order: equal on every run.
#include "cuda/scope.cuh"
#include "cuda/launch.h"
#include "cuda/sparse_staged.cuh"

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

// The staged path.
// A block holds its samples in shared memory, [column][sample], and a zero after the last column.  A row is shared out
// among kLanes lanes, 8 entries at a time: 16 bytes of columns, 16 or 32 of values, on the boundaries of 16 bytes, so
// that the first and the last 8 may reach into other rows; what is foreign there is sent to the zero.  All loads of
// kAhead rounds are under way before the first is used, for the first row even before the input is there.  Entry i of a
// lane meets entry i of the other lanes in shared memory: bank_layout (zipfast/ops/sparse_linear.py) orders a row so
// that they fall into different banks.  A sample's sum has the same order whatever the batch.

template <class scalar_t, int kSamples, int kLanes>
__global__ void __launch_bounds__(kStagedThreads, kStagedBlocks<kSamples>)
    sparse_linear_staged_kernel(const __grid_constant__ SparseJob job) {
  using L = Layout<scalar_t, kSamples>;
  using E = Entries<scalar_t>;
  constexpr int kAhead = sizeof(scalar_t) == 2 ? 4 : 2, kRound = kLanes * E::kCount, kRows = 32 / kLanes;
  ZF_DYN_SHARED(typename L::Word, shared);
  ask_ahead<scalar_t>(job);

  const int plane = staged_columns(job.columns), sample = blockIdx.y * kSamples, lane = threadIdx.x % kLanes;
  // A warp's rows, one beside the other, then as many again one grid further on: every block gets its share of the
  // last.
  const long long warp = (long long)(threadIdx.x / 32) * gridDim.x + blockIdx.x;
  const long long step = (long long)gridDim.x * (kStagedThreads / 32) * kRows;
  long long first = warp * kRows, row = first + threadIdx.x % 32 / kLanes;

  uint32_t begin = 0, end = 0, next_begin = 0, next_end = 0;
  const auto bounds = [&](long long r, uint32_t& from, uint32_t& to) {
    from = r < job.rows ? uint32_t(job.row_start[r]) : 0u;
    to = r < job.rows ? uint32_t(job.row_start[r + 1]) : 0u;
  };
  const uint32_t whole = uint32_t(job.alive) / E::kCount * E::kCount;  // the last entries are not loaded by 16 bytes
  uint32_t base, stop;
  E entries[kAhead];
  const auto fetch = [&] {
    ZF_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const uint32_t at = base + a * kRound + lane * E::kCount;
      if (at < stop) entries[a].load(job, at);
    }
  };

  bounds(row, begin, end);
  Stage<scalar_t, kSamples> stage;
  const bool by_words = stage.whole(job);
  if (by_words) stage.load(job, sample, threadIdx.x);
  bounds(row + step, next_begin, next_end);
  base = begin / E::kCount * E::kCount, stop = end < whole ? end : whole;
  fetch();
  if (by_words)
    stage.copy(job, shared, sample);
  else
    stage.copy_each(job, shared, sample);
  __syncthreads();

  while (first < job.rows) {  // all of a warp: its lanes meet in the sums
    float sum[kSamples] = {};
    const auto add = [&](float weight, uint32_t column) {
      ZF_UNROLL
      for (int p = 0; p < L::kPlanes; ++p) {
        const typename L::Word x = shared[p * plane + column];
        ZF_UNROLL
        for (int j = 0; j < L::kEach; ++j) {
          const int w = p * L::kEach + j;
          if constexpr (L::kTwo) {
            sum[2 * w] += weight * low_of<scalar_t>(x.at[j]);
            sum[2 * w + 1] += weight * high_of<scalar_t>(x.at[j]);
          } else {
            sum[w] += weight * bits_to_float(x.at[j]);
          }
        }
      }
    };
    while (base < stop) {
      ZF_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const uint32_t at = base + a * kRound + lane * E::kCount;
        if (at >= stop) continue;
        if (at < begin || at + E::kCount > end) entries[a].keep(at, begin, end, uint32_t(job.columns));
        ZF_UNROLL
        for (int i = 0; i < E::kCount; ++i) add(entries[a].value_at(i), entries[a].column_at(i));
      }
      base += kAhead * kRound;
      if (base < stop) fetch();
    }
    if (end > whole && lane == int((whole - begin / E::kCount * E::kCount) / E::kCount % kLanes))
      for (uint32_t i = begin > whole ? begin : whole; i < end; ++i)
        add(widen(static_cast<const scalar_t*>(job.value)[i]), static_cast<const uint16_t*>(job.column)[i]);

    const long long done = row;
    first += step, row += step;
    begin = next_begin, end = next_end;
    base = begin / E::kCount * E::kCount, stop = end < whole ? end : whole;
    fetch();  // under way while the sums of this row meet
    bounds(row + step, next_begin, next_end);

    // Each step hands half of the samples to the other lane, as long as there are two: one is left in each lane.
    int held = kSamples, mine = 0;
    ZF_UNROLL
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      if (held > 1) {
        held /= 2;
        const bool upper = lane & apart;
        ZF_UNROLL
        for (int s = 0; s < kSamples / 2; ++s) {
          if (s >= held) continue;
          const float given = upper ? sum[s] : sum[s + held], kept = upper ? sum[s + held] : sum[s];
          sum[s] = kept + __shfl_xor_sync(kFullWarp, given, apart);
        }
        mine += upper ? held : 0;
      } else {
        sum[0] += __shfl_xor_sync(kFullWarp, sum[0], apart);
      }
    }
    const bool writes = lane % (kLanes / kSamples) == 0;  // of the lanes with equal sums
    if (writes && done < job.rows && sample + mine < job.batch) write<scalar_t>(job, sample + mine, done, sum[0]);
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

// What a block may use, and how many blocks there may be at once.
struct Room {
  int shared = 0, processors = 0;
  Room() {
#ifdef ZF_EMU
    shared = 4096, processors = 1;  // little: tests are to see several groups of samples and rows
#else
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return;
    (void)cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    (void)cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
#endif
  }
};

long long staged_bytes(DType dtype, long long columns, int samples) {
  const int each = dtype == DType::f32 ? 4 * samples : samples == 1 ? 4 : 2 * samples;
  return staged_columns(columns) * each;
}

template <class scalar_t, int kSamples, int kLanes>
cudaError_t staged(const SparseJob& job, long long bytes, const Room& room, cudaStream_t stream) {
#ifndef ZF_EMU
  // The most there is, not what this call needs: the limit belongs to the kernel, and another thread may launch it.
  const cudaError_t e = cudaFuncSetAttribute(sparse_linear_staged_kernel<scalar_t, kSamples, kLanes>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, room.shared);
  if (e != cudaSuccess) return e;
#endif
  const long long each = kStagedThreads / kLanes, blocks = (job.rows + each - 1) / each;
  const long long most = (long long)room.processors * kStagedBlocks<kSamples>;
  const dim3 grid(unsigned(blocks < most ? blocks : most), unsigned((job.batch + kSamples - 1) / kSamples));
  ZF_LAUNCH((sparse_linear_staged_kernel<scalar_t, kSamples, kLanes>), grid, unsigned(kStagedThreads), size_t(bytes),
            stream, job);
  return cudaGetLastError();
}

}  // namespace

int sparse_staged_samples(DType dtype, long long columns, long long batch) {
  const Room room;
  int samples = 1;
  while (samples < batch && samples < kSparseFew) samples *= 2;
  while (samples > 0 && staged_bytes(dtype, columns, samples) > room.shared) samples /= 2;
  return columns < 0xffff ? samples : 0;  // the zero has a column too
}

cudaError_t sparse_linear_staged(DType dtype, const SparseJob& job, cudaStream_t stream) {
  if (job.rows == 0 || job.batch == 0) return cudaSuccess;
  const int samples = sparse_staged_samples(dtype, job.columns, job.batch);
  const Room room;
  const long long bytes = staged_bytes(dtype, job.columns, samples);
  return dispatch(dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    if constexpr (std::is_same_v<scalar_t, double>) {
      return cudaErrorInvalidConfiguration;
    } else {
      // Rows that 16 lanes cannot load at once get all 32.
      const auto run = [&](auto count) {
        constexpr int kSamples = decltype(count)::value;
        if (job.alive > 512 * job.rows) return staged<scalar_t, kSamples, 32>(job, bytes, room, stream);
        return staged<scalar_t, kSamples, 16>(job, bytes, room, stream);
      };
      switch (samples) {
        case 1:
          return run(std::integral_constant<int, 1>{});
        case 2:
          return run(std::integral_constant<int, 2>{});
        case 4:
          return run(std::integral_constant<int, 4>{});
        case 8:
          return run(std::integral_constant<int, 8>{});
        case 16:
          return run(std::integral_constant<int, 16>{});
        default:
          return cudaErrorInvalidConfiguration;
      }
    }
  });
}

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
