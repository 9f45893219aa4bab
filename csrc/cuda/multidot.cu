// SPDX-License-Identifier: Apache-2.0
// multidot on a GPU: <g_j, x_ij> for all models and tensors in two launches.
//
// A block owns kSoupPiece elements of one tensor.  A thread holds its elements of g in registers, as float64, and runs
// over the models: their elements come in 16-byte accesses, eight of them in flight.  Products are summed in float64 by
// thread, then by warp, then over the warps in order; a second kernel adds the pieces, a block for each sum.  Which
// thread adds what follows from shapes and dtypes alone, not from where tensors lie.  No atomics: equal on every run.
#include "cuda/soup.cuh"

namespace zipfast::cuda {

namespace {

constexpr int kWarps = kSoupThreads / 32;
constexpr int kModels = 32;    // between two barriers
constexpr int kInFlight = 32;  // words that a thread asks for before it uses one

using WarpSums = double[kModels][kWarps];

__device__ inline void keep_sum(double sum, double* warp) {
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = sum;
}

// Sums of a full, aligned piece for models [first, first + count).
template <class Type>
__device__ inline void dot_whole(const MultidotJob& job, const SoupPlace& place, const double* g, int first, int count,
                                 WarpSums& warp) {
  constexpr int kCount = Type::kCount, kGroups = kSoupEach / kCount;
  constexpr int kTogether = kInFlight / (kGroups * Type::kWords);  // models
  const void* const* x = job.list.x + place.tensor * job.list.models + first;
  const uint8_t* dtype = job.list.dtype + place.tensor * job.list.models + first;
  const long long begin = place.begin + (long long)threadIdx.x * kCount;
  for (int i = 0; i < count; i += kTogether) {
    uint32_t word[kTogether][kGroups][Type::kWords] = {};
    ZF_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      if (i + u >= count) break;
      ZF_UNROLL
      for (int q = 0; q < kGroups; ++q)
        Type::fetch(x[i + u], DType(dtype[i + u]), begin + q * kSoupThreads * kCount, kCount, true, word[u][q]);
    }
    ZF_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      if (i + u >= count) break;
      double sum = 0;
      ZF_UNROLL
      for (int q = 0; q < kGroups; ++q) {
        double value[kCount];
        Type::open(word[u][q], DType(dtype[i + u]), value);
        ZF_UNROLL
        for (int e = 0; e < kCount; ++e) sum += g[q * kCount + e] * value[e];
      }
      keep_sum(sum, warp[i + u]);
    }
  }
}

// The same sums, element for element in the same order, of a piece with an end or of tensors that are not aligned.
template <class Type>
__device__ inline void dot_ragged(const MultidotJob& job, const SoupPlace& place, int first, int count,
                                  WarpSums& warp) {
  constexpr int kCount = Type::kCount;
  const bool aligned = job.list.aligned[place.tensor];
  const DType own = DType(job.g_dtype[place.tensor]);
  for (int i = 0; i < count; ++i) {
    const int of = place.tensor * job.list.models + first + i;
    const DType dtype = DType(job.list.dtype[of]);
    double sum = 0;
    for (long long at = place.begin + (long long)threadIdx.x * kCount; at < place.end; at += kSoupThreads * kCount) {
      const int n = place.end - at < kCount ? int(place.end - at) : kCount;
      const bool whole = aligned && n == kCount;
      uint32_t word[Type::kWords];
      double g[kCount], value[kCount];
      Type::fetch(job.g[place.tensor], own, at, n, whole, word);
      Type::open(word, own, g);
      Type::fetch(job.list.x[of], dtype, at, n, whole, word);
      Type::open(word, dtype, value);
      ZF_UNROLL
      for (int e = 0; e < kCount; ++e) sum += g[e] * value[e];
    }
    keep_sum(sum, warp[i]);
  }
}

template <class Type>
__device__ inline void dot_piece(const MultidotJob& job, const SoupPlace& place, WarpSums& warp) {
  constexpr int kCount = Type::kCount;
  const bool whole = job.list.aligned[place.tensor] && place.end - place.begin == kSoupPiece;
  double g[kSoupEach];
  if (whole) {
    const DType dtype = DType(job.g_dtype[place.tensor]);
    ZF_UNROLL
    for (int q = 0; q < kSoupEach / kCount; ++q) {
      uint32_t word[Type::kWords];
      const long long at = place.begin + (long long)(q * kSoupThreads + int(threadIdx.x)) * kCount;
      Type::fetch(job.g[place.tensor], dtype, at, kCount, true, word);
      Type::open(word, dtype, g + q * kCount);
    }
  }
  for (int first = 0; first < job.list.models; first += kModels) {
    const int count = job.list.models - first < kModels ? job.list.models - first : kModels;
    if (whole)
      dot_whole<Type>(job, place, g, first, count, warp);
    else
      dot_ragged<Type>(job, place, first, count, warp);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kSoupThreads) {
      double sum = warp[i][0];
      for (int w = 1; w < kWarps; ++w) sum += warp[i][w];
      job.part[(long long)(first + i) * job.list.blocks + blockIdx.x] = sum;
    }
    __syncthreads();  // before the sums of the next models
  }
}

}  // namespace

// part [models, blocks]
__global__ void __launch_bounds__(kSoupThreads, 2) multidot_part_kernel(const __grid_constant__ MultidotJob job) {
  __shared__ WarpSums warp;
  const SoupPlace place = soup_place(job.list, blockIdx.x);
  switch (job.list.same[place.tensor]) {
    case uint8_t(DType::f32):
      return dot_piece<OneType<float>>(job, place, warp);
    case uint8_t(DType::f64):
      return dot_piece<OneType<double>>(job, place, warp);
    case uint8_t(DType::f16):
      return dot_piece<OneType<Half>>(job, place, warp);
    case uint8_t(DType::bf16):
      return dot_piece<OneType<BFloat16>>(job, place, warp);
    default:
      return dot_piece<AnyType>(job, place, warp);
  }
}

// A block per (model, tensor): thread t adds pieces t, t + threads, ... in order, then warps are added in order.
__global__ void __launch_bounds__(kSoupThreads) multidot_add_kernel(const __grid_constant__ MultidotJob job) {
  __shared__ double warp[kWarps];
  const SoupList& list = job.list;
  const int i = int(blockIdx.x) / list.tensors, tensor = int(blockIdx.x) % list.tensors;
  const long long first = list.tensor[tensor].first;
  const long long last = tensor + 1 < list.tensors ? list.tensor[tensor + 1].first : list.blocks;
  double sum = strided_sum<kSoupThreads>(job.part + i * list.blocks + first, last - first, int(threadIdx.x));
  if (last - first > 1) {
    keep_sum(sum, warp);
    __syncthreads();
    sum = warp[0];
    for (int w = 1; w < kWarps; ++w) sum += warp[w];
  }
  if (threadIdx.x == 0) job.out[(long long)i * list.stride + list.column + tensor] = sum;
}

cudaError_t multidot(const MultidotJob& job, cudaStream_t stream) {
  const SoupList& list = job.list;
  if (list.blocks > 0) ZF_LAUNCH((multidot_part_kernel), unsigned(list.blocks), unsigned(kSoupThreads), 0, stream, job);
  ZF_LAUNCH((multidot_add_kernel), unsigned(list.tensors * list.models), unsigned(kSoupThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
