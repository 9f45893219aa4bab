// SPDX-License-Identifier: Apache-2.0
// regroup on a GPU: one thread per output element, members summed in float64 in the order given.  No atomics: equal on
// every run.  Consecutive threads walk `inner` (or, where inner is 1, the groups), so writes are coalesced; a group's
// members are gathered rows.  Cost: each input read once per membership, each output written once.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

template <class scalar_t>
__global__ void regroup_sum_kernel(const RegroupJob job) {
  const int64_t total = job.outer * job.groups * job.inner;
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < total; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t k = e % job.inner, g = e / job.inner % job.groups, o = e / job.inner / job.groups;
    double sum = 0;
    bool bad = false;
    for (int64_t p = job.start[g]; p < job.start[g + 1]; ++p) {
      const int64_t f = p >= 0 && p < job.members ? job.order[p] : -1;
      if (f < 0 || f >= job.models * job.size) {
        bad = true;  // only the values tell, and an op may not stop to look: NaN shows it
        break;
      }
      const scalar_t* x = static_cast<const scalar_t*>(job.x[f / job.size]);
      sum += widen(x[(o * job.size + f % job.size) * job.inner + k]);
    }
    if (job.divisor) sum /= job.divisor[g];
    static_cast<scalar_t*>(job.out)[e] = narrow<scalar_t>(bad ? double(NAN) : sum);
  }
}

cudaError_t regroup(DType dtype, const RegroupJob& job, cudaStream_t stream) {
  const int64_t total = job.outer * job.groups * job.inner;
  if (total == 0) return cudaSuccess;
#ifdef ZF_EMU
  constexpr int64_t kThreads = 64, kMostBlocks = 2;  // few: the grid-stride loop must take several turns
#else
  constexpr int64_t kThreads = 256, kMostBlocks = 8 * 132;
#endif
  const int64_t blocks = (total + kThreads - 1) / kThreads;
  dispatch(dtype, [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    ZF_LAUNCH((regroup_sum_kernel<scalar_t>), unsigned(blocks < kMostBlocks ? blocks : kMostBlocks), unsigned(kThreads),
              0, stream, job);
  });
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
