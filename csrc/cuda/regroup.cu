// SPDX-License-Identifier: Apache-2.0
// regroup on a GPU: members summed in float64 in the order given.  No atomics: equal on every run.
//
// A thread has 16 bytes of the output along `inner`, where that is a multiple of them and tensors are aligned, else one
// element, so that neighbouring threads write and (along `inner`) read neighbouring memory; where inner is 1 they walk
// the groups.  Cost: each input read once per membership, each output written once.
#include "cuda/access.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

// index_t: 32 bits where they hold every index, as a division of 64 bits takes longer than all else here.
template <class scalar_t, int kCount, class index_t>
__global__ void regroup_sum_kernel(const __grid_constant__ RegroupJob job) {
  const index_t inner = index_t(job.inner), groups = index_t(job.groups), size = index_t(job.size);
  const index_t across = inner / kCount, total = index_t(job.outer) * groups * across;
  for (index_t e = index_t(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += index_t(gridDim.x) * blockDim.x) {
    const index_t row = e / across, k = (e - row * across) * kCount, o = row / groups, g = row - o * groups;
    double sum[kCount] = {};
    bool bad = false;
    const int64_t end = job.start[g + 1];
    for (int64_t p = job.start[g]; p < end; ++p) {
      const int64_t f = p >= 0 && p < job.members ? job.order[p] : -1;
      if (f < 0 || f >= job.models * job.size) {
        bad = true;  // only the values tell, and an op may not stop to look: NaN shows it
        break;
      }
      const index_t model = index_t(f) / size, of = index_t(f) - model * size;
      const scalar_t* x = static_cast<const scalar_t*>(job.x[model]);
      scalar_t value[kCount];
      load_group<kCount>(x + (o * size + of) * inner + k, kCount, kCount > 1, value);
      ZF_UNROLL
      for (int i = 0; i < kCount; ++i) sum[i] += widen(value[i]);
    }
    const double divisor = job.divisor ? job.divisor[g] : 1;
    scalar_t value[kCount];
    ZF_UNROLL
    for (int i = 0; i < kCount; ++i) value[i] = narrow<scalar_t>(bad ? double(NAN) : sum[i] / divisor);
    store_group<kCount>(static_cast<scalar_t*>(job.out) + row * inner + k, kCount, kCount > 1, value);
  }
}

cudaError_t regroup(DType dtype, const RegroupJob& job, cudaStream_t stream) {
  if (job.outer * job.groups * job.inner == 0) return cudaSuccess;
#ifdef ZF_EMU
  constexpr int64_t kThreads = 64, kMostBlocks = 2;  // few: the grid-stride loop must take several turns
  constexpr int64_t kNarrow = 1000;                  // small: tests are to see indices of both widths
#else
  constexpr int64_t kThreads = 256, kMostBlocks = 8 * 132;
  constexpr int64_t kNarrow = int64_t(1) << 31;  // leaves room for the grid's step beyond the last index
#endif
  const int64_t most = job.outer * job.inner * (job.groups > job.size ? job.groups : job.size);
  const bool narrow = most < kNarrow && job.models * job.size < kNarrow;
  dispatch(dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    const bool whole = job.aligned && job.inner % kGroup<scalar_t> == 0;
    const int64_t threads = job.outer * job.groups * (whole ? job.inner / kGroup<scalar_t> : job.inner);
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    const unsigned grid = unsigned(blocks < kMostBlocks ? blocks : kMostBlocks);
    if (!narrow)
      ZF_LAUNCH((regroup_sum_kernel<scalar_t, 1, int64_t>), grid, unsigned(kThreads), 0, stream, job);
    else if (!whole)
      ZF_LAUNCH((regroup_sum_kernel<scalar_t, 1, uint32_t>), grid, unsigned(kThreads), 0, stream, job);
    else
      ZF_LAUNCH((regroup_sum_kernel<scalar_t, kGroup<scalar_t>, uint32_t>), grid, unsigned(kThreads), 0, stream, job);
  });
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
