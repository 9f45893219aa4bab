// SPDX-License-Identifier: Apache-2.0
// What compute capability 9.0 has beyond its predecessors, one function an instruction: barriers that count bytes, bulk
// copies into the shared memory of one block or of a cluster, products of warpgroups.  Compiled for sm_90a; the
// emulator has the same functions.  For other targets ZF_HOPPER is 0, and kernels that use these have an empty body
// there.
//
// Proxies: bulk copies and wgmma both read and write shared memory through the async proxy, so that nothing has to be
// fenced between them; a barrier that was waited for makes copied bytes visible to ordinary loads as well.
#pragma once
#include "cuda/scope.cuh"
#ifdef ZF_EMU
#include "../emu/hopper.h"
#define ZF_HOPPER 1
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ZF_HOPPER 1
#else
#define ZF_HOPPER 0
#endif

// The blocks of a cluster, an attribute of its kernel.
#if ZF_HOPPER && !defined(ZF_EMU)
#define ZF_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define ZF_CLUSTER(blocks)
#endif

#ifdef ZF_EMU
#define ZF_LAUNCH_CLUSTER(kernel, cluster, grid, block, smem, stream, ...) \
  ::cuda_emu::launch_cluster([](auto... a) { kernel(a...); }, cluster, dim3(grid), dim3(block), smem, __VA_ARGS__)
#else
// More than 48 KB of shared memory must be asked for.
#define ZF_LAUNCH_CLUSTER(kernel, cluster, grid, block, smem, stream, ...)                                 \
  do {                                                                                                     \
    (void)cudaFuncSetAttribute(ZF_UNPAREN kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem)); \
    ZF_LAUNCH(kernel, grid, block, smem, stream, __VA_ARGS__);                                             \
  } while (0)
#endif

namespace zipfast::cuda::hopper {

#if ZF_HOPPER

// Descriptor of a K-major operand with the 128-byte swizzle: rows of 64 numbers (128 bytes), eight of them 1024 bytes,
// whose 16-byte units lie at unit ^ row % 8.  The first row must be aligned to 1024 bytes; 16 columns further is
// kStepK further in the address.  For this layout the leading offset means nothing.
constexpr uint32_t kSwizzleRows = 8, kSwizzleBytes = 1024, kRowBytes = 128;
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t(1) << 62 | uint64_t(kSwizzleBytes >> 4) << 32 | uint64_t(1) << 16 | (address & 0x3ffffu) >> 4;
}
constexpr uint64_t kStepK = 16 * 2 >> 4;  // of the descriptor

#ifdef ZF_EMU

using cuda_emu::barrier_init;
using cuda_emu::barrier_wait;
using cuda_emu::cluster_rank;
using cuda_emu::cluster_sync;
using cuda_emu::shared_address;
inline void barrier_init_done() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  cuda_emu::barrier_arrive(cuda_emu::blk, barrier, int32_t(bytes));
}
inline void barrier_arrive(uint32_t barrier, unsigned rank) {
  cuda_emu::barrier_arrive(cuda_emu::cluster_block(rank), barrier, 0);
}
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  cuda_emu::bulk_copy(to, from, bytes, barrier, 1u << cuda_emu::cluster_rank());
}
inline void bulk_copy_all(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, unsigned mask) {
  cuda_emu::bulk_copy(to, from, bytes, barrier, mask);
}
inline void prefetch(const void*, uint32_t) {}
inline void compiler_barrier() {}
inline void wgmma_fence() {}
using cuda_emu::wgmma_commit;
template <int kMost>
void wgmma_wait(float (&)[64]) {
  cuda_emu::wgmma_wait(kMost);
}
template <class T>
void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  cuda_emu::wgmma_issue({d, a, b, [](uint16_t bits) { return widen(T{bits}); }, accumulate});
}

#else

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster; what they wrote before is visible to all of them.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// An mbarrier completes a phase after `count` arrivals and all bytes that were announced.
__device__ inline void barrier_init(uint32_t barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Behind the last init, before the threads (and the copy engine) of the cluster may use them; a cluster_sync follows.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives and announces bytes.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier that lies at this place in block `rank` of the cluster.  Says that this block has read what
// that one will overwrite, and nothing about ordinary writes: a release to the whole cluster would wait for all of
// those.
__device__ inline void barrier_arrive(uint32_t barrier, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Until the phase of this parity is complete; a fresh barrier is in phase 0, and counts as past phase 1.
__device__ inline void barrier_wait(uint32_t barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Copies 16-byte aligned bytes to this block, and takes them off what `barrier` waits for.
__device__ inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}
// The same, to the same place of every block in the mask, and their barriers: read once from the second-level cache.
__device__ inline void bulk_copy_all(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, unsigned mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "h"(uint16_t(mask))
      : "memory");
}
// Of 16-byte aligned bytes, into the second-level cache.
__device__ inline void prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

// Memory is not read ahead of here.
__device__ inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// Before the first product, and between other accesses to accumulators and the next one.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define ZF_EIGHT(d, i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define ZF_ALL(d)                                                                                                      \
  ZF_EIGHT(d, 0), ZF_EIGHT(d, 8), ZF_EIGHT(d, 16), ZF_EIGHT(d, 24), ZF_EIGHT(d, 32), ZF_EIGHT(d, 40), ZF_EIGHT(d, 48), \
      ZF_EIGHT(d, 56)

// Until at most kMost committed groups are under way.  With none left the accumulators may be used: they are named, so
// that the compiler moves no use of them ahead.
template <int kMost>
__device__ inline void wgmma_wait(float (&d)[64]) {
  if constexpr (kMost == 0)
    asm volatile("wgmma.wait_group.sync.aligned 0;" : ZF_ALL(d)::"memory");
  else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kMost) : "memory");
}

// d [64, 128] (+)= A [64, 16] B [128, 16]^T.  Warp w of the warpgroup holds rows 16 w to 16 w + 15; in lane l, d[4 j +
// 2 h + i] belongs to row l / 4 + 8 h and column 8 j + 2 (l % 4) + i.
#define ZF_WGMMA(type)                                                                                             \
  asm volatile(                                                                                                    \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                 \
      " "                                                                                                          \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "  \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "      \
      "%64, %65, add, 1, 1, 0, 0;\n}"                                                                              \
      : ZF_ALL(d)                                                                                                  \
      : "l"(a), "l"(b), "r"(int(accumulate)))
template <class T>
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, BFloat16>)
    ZF_WGMMA("bf16");
  else
    ZF_WGMMA("f16");
}
#undef ZF_WGMMA
#undef ZF_ALL
#undef ZF_EIGHT

#endif
#endif

}  // namespace zipfast::cuda::hopper
