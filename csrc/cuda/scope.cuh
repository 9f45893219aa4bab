// SPDX-License-Identifier: Apache-2.0
// What every kernel file includes first: CUDA itself or the emulator, the launch macros, and reductions named by their
// scope.  Each says where its result is valid.
#pragma once
#ifdef ZF_EMU
#include "../emu/cuda_emu.h"
#define ZF_UNROLL
#define ZF_ROLLED
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cmath>
#define ZF_UNROLL _Pragma("unroll")
#define ZF_ROLLED _Pragma("unroll 1")
#define ZF_DYN_SHARED(T, name)                              \
  extern __shared__ __align__(16) unsigned char zf_smem_[]; \
  T* name = reinterpret_cast<T*>(zf_smem_)
#define ZF_UNPAREN(...) __VA_ARGS__
#define ZF_LAUNCH(kernel, grid, block, smem, stream, ...) ZF_UNPAREN kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
// All blocks resident at once, so that grid.sync() may be called.  One argument, passed by value.
#define ZF_LAUNCH_COOP(kernel, grid, block, smem, stream, argument)                                               \
  do {                                                                                                            \
    void* zf_arguments_[] = {const_cast<void*>(static_cast<const void*>(&(argument)))};                           \
    (void)cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&ZF_UNPAREN kernel), dim3(grid), dim3(block), \
                                      zf_arguments_, smem, stream);                                               \
  } while (0)
#endif
#include <cstdint>

namespace zipfast::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// An edge of the similarity graph as the matcher orders them: larger value first, then smaller row, then smaller
// column.
template <class scalar_t>
struct Edge {
  scalar_t value;
  int row, col;
};
template <class scalar_t>
__device__ inline bool precedes(const Edge<scalar_t>& a, const Edge<scalar_t>& b) {
  if (a.value != b.value) return a.value > b.value;
  return a.row != b.row ? a.row < b.row : a.col < b.col;
}

// Valid in every lane.
template <class scalar_t>
__device__ inline Edge<scalar_t> warp_first(Edge<scalar_t> e) {
  for (int step = 16; step > 0; step >>= 1) {
    const Edge<scalar_t> other{__shfl_xor_sync(kFullWarp, e.value, step), __shfl_xor_sync(kFullWarp, e.row, step),
                               __shfl_xor_sync(kFullWarp, e.col, step)};
    if (precedes(other, e)) e = other;
  }
  return e;
}

// Valid in every thread.  `scratch` holds kThreads / 32 edges; contains two barriers.
template <int kThreads, class scalar_t>
__device__ inline Edge<scalar_t> block_first(Edge<scalar_t> e, Edge<scalar_t>* scratch) {
  constexpr int kWarps = kThreads / 32;
  e = warp_first(e);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = e;
  __syncthreads();
  e = scratch[0];
  for (int w = 1; w < kWarps; ++w)
    if (precedes(scratch[w], e)) e = scratch[w];
  __syncthreads();  // the scratch may be written again
  return e;
}

}  // namespace zipfast::cuda
