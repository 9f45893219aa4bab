// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels on the host, to test their LOGIC (not their speed) where there is no GPU and no CUDA toolkit.
//   * One CUDA thread is one fiber (ucontext); one block is the fibers of one OS thread, so that `__shared__` can be
//     `static thread_local`; blocks run on a small pool, all at once if the launch is cooperative.
//   * The schedule is random and adversarial: a warp runs as far ahead as barriers allow (seed: CUDA_EMU_SEED), so that
//     a missing barrier shows as a wrong result.
//   * Divergent barriers, shuffles from lanes outside the mask and bad launches abort with a message.
//   * Under -fsanitize=thread each fiber is a TSan fiber and only real CUDA barriers synchronise: a data race on shared
//     or global memory is reported at its line, as compute-sanitizer's racecheck does on a GPU.
//   * Blocks of a cluster are fibers of one OS thread, each with its own dynamic (but the same static) shared memory.
// Instructions of one generation of GPUs are emulated beside this, in a header that includes it (hopper.h).
#pragma once
#if defined(__CUDACC__)
#error "cuda_emu.h is for the host compiler only"
#endif
#include <ucontext.h>
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

// The few runtime types that the kernels and launchers name.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorCooperativeLaunchTooLarge = 720 };
using cudaStream_t = void*;

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
struct EmuIgnore {  // the emulator's own bookkeeping is not the kernel's: keep it out of the race detector
  EmuIgnore() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~EmuIgnore() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
#define EMU_TSAN(x) x
#else
#define EMU_TSAN(x)
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#define EMU_ASAN(x) x
#else
#define EMU_ASAN(x)
#endif

namespace cuda_emu {
[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_emu: %s\n", what);
  std::abort();
}
constexpr size_t kStack = 64 << 10, kSharedAlign = 1024;
struct Block;
struct Warp {
  unsigned alive = 0, arrived = 0, n = 0;
  unsigned gen[32] = {}, inst[32] = {};
  alignas(16) unsigned char slot[32][16];
  char arr[32], ring[64];
};
struct Fiber {
  ucontext_t ctx;
  uint3 tid;
  unsigned linear;
  bool done = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* tsan = nullptr;
};
// The fibers of one OS thread, kept from block to block and from launch to launch: under a sanitizer, making one costs
// more than what it runs.  Blocks of one OS thread follow each other anyway, so this hides no race.
struct Pool {
  std::vector<std::unique_ptr<Fiber>> fibers;
};
inline std::mutex pools_lock;
inline auto& pools = *new std::vector<std::unique_ptr<Pool>>;  // never freed: fibers are asleep in the middle of a call
inline std::vector<std::unique_ptr<Pool>> borrow(size_t count) {
  const std::lock_guard<std::mutex> lock(pools_lock);
  std::vector<std::unique_ptr<Pool>> found;
  for (size_t i = 0; i < count; ++i) {
    if (pools.empty()) {
      found.push_back(std::make_unique<Pool>());
    } else {
      found.push_back(std::move(pools.back()));
      pools.pop_back();
    }
  }
  return found;
}
inline void give_back(std::vector<std::unique_ptr<Pool>> found) {
  const std::lock_guard<std::mutex> lock(pools_lock);
  for (size_t i = found.size(); i > 0; --i) pools.push_back(std::move(found[i - 1]));
}
struct Grid {
  dim3 grid, block;
  size_t smem;
  std::function<void()> body;
  unsigned cluster = 1;  // blocks in a row of the grid that run together
  std::barrier<>* gsync = nullptr;
  unsigned seed = 0;
};
struct Block {
  Grid* g;
  uint3 bid;
  std::vector<Fiber*> f;
  std::vector<Warp> w;
  std::vector<char> smem;
  ucontext_t sched;
  Fiber* cur = nullptr;
  unsigned alive = 0, arrived = 0, gen = 0;
  bool progress = false, later = false;  // later: a thread gives way although it could go on
  unsigned turns = 0;
  void* tsan = nullptr;
  char sync[2], start;
  Block* first = nullptr;  // of its cluster's blocks, which lie one behind the other
  unsigned cluster_alive = 0, cluster_arrived = 0, cluster_gen = 0;  // of the first
  const void* sched_stack = nullptr;
  size_t sched_size = 0;
};
inline thread_local Block* blk = nullptr;
// A fiber may go on in another OS thread at its next block: the address of a thread's variable must be asked for again.
[[gnu::noinline]] inline Block* block_here() {
  asm volatile("");
  return blk;
}

// Where a block's dynamic shared memory begins.
inline char* shared_base(Block* b) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(b->smem.data());
  return reinterpret_cast<char*>((at + kSharedAlign - 1) & ~uintptr_t(kSharedAlign - 1));
}

inline void yield() {
  Block* b = blk;
  Fiber* me = b->cur;
  EMU_ASAN(void* fs = nullptr; __sanitizer_start_switch_fiber(&fs, b->sched_stack, b->sched_size);)
  EMU_TSAN(__tsan_switch_to_fiber(b->tsan, 1);)
  swapcontext(&me->ctx, &b->sched);
  EMU_ASAN(__sanitizer_finish_switch_fiber(fs, nullptr, nullptr);)
}
inline void entry() {
  EMU_ASAN(void* fs = nullptr;)
  for (;;) {  // one round is one CUDA thread
    Block* b = block_here();
    EMU_ASAN(__sanitizer_finish_switch_fiber(fs, &b->sched_stack, &b->sched_size);)
    EMU_TSAN(__tsan_acquire(&b->start);)
    b->g->body();
    Fiber* me;
    {
      EMU_TSAN(EmuIgnore ign; __tsan_release(&b->alive);)
      me = b->cur;
      me->done = true;
      b->progress = true;
      b->first->cluster_alive--;
      if (--b->alive == b->arrived && b->alive) {
        b->arrived = 0;
        b->gen++;
      }  // exited threads no longer count
      Warp& w = b->w[me->linear / 32];
      w.alive &= ~(1u << (me->linear % 32));
    }
    EMU_ASAN(__sanitizer_start_switch_fiber(&fs, b->sched_stack, b->sched_size);)
    EMU_TSAN(__tsan_switch_to_fiber(b->tsan, 1);)
    swapcontext(&me->ctx, &b->sched);
  }
}
inline Fiber* make_fiber() {
  auto* f = new Fiber;
  getcontext(&f->ctx);
  f->ctx.uc_stack.ss_sp = f->stack.get();
  f->ctx.uc_stack.ss_size = kStack;
  f->ctx.uc_link = nullptr;
  makecontext(&f->ctx, entry, 0);
  EMU_TSAN(f->tsan = __tsan_create_fiber(0);)
  return f;
}
// Fibers from `fiber` on become the threads of one block.
inline void begin_block(Block& b, Grid* g, uint3 bid, Pool& pool, size_t fiber) {
  b.g = g;
  b.bid = bid;
  const unsigned n = g->block.x * g->block.y * g->block.z;
  b.f.resize(n);
  b.w.resize((n + 31) / 32);
  b.alive = n;
  b.smem.assign(g->smem + kSharedAlign, char(0xCB));
  EMU_TSAN(b.tsan = __tsan_get_current_fiber();)
  for (unsigned i = 0; i < n; ++i) {
    if (fiber + i == pool.fibers.size()) pool.fibers.emplace_back(make_fiber());
    Fiber& f = *pool.fibers[fiber + i];
    b.f[i] = &f;
    f.done = false;
    f.linear = i;
    f.tid = {i % g->block.x, i / g->block.x % g->block.y, i / (g->block.x * g->block.y)};
    b.w[i / 32].alive |= 1u << (i % 32);
  }
  EMU_TSAN(__tsan_release(&b.start);)
}
// Lets each warp of a block run as far as it can get; false if none got anywhere.
inline bool turn(Block& b, std::mt19937& rng, std::vector<unsigned>& wo, std::vector<unsigned>& lo) {
  const unsigned n = unsigned(b.f.size());
  bool any = false;
  blk = &b;
  if (b.g->seed) std::shuffle(wo.begin(), wo.end(), rng);
  for (unsigned w : wo) do {
      b.progress = false;
      if (b.g->seed) std::shuffle(lo.begin(), lo.end(), rng);
      for (unsigned l : lo) {
        const unsigned i = w * 32 + l;
        if (i >= n || b.f[i]->done) continue;
        Fiber& f = *b.f[i];
        b.cur = &f;
        EMU_ASAN(void* fs = nullptr; __sanitizer_start_switch_fiber(&fs, f.stack.get(), kStack);)
        EMU_TSAN(__tsan_switch_to_fiber(f.tsan, 1);)
        swapcontext(&b.sched, &f.ctx);
        EMU_ASAN(__sanitizer_finish_switch_fiber(fs, nullptr, nullptr);)
      }
      any |= b.progress;
    } while (b.progress);
  any |= b.later;
  b.later = false;
  b.turns++;
  return any;
}
// The blocks of one cluster, side by side in x; mostly that is one block.
inline void run_cluster(Grid* g, uint3 bid, Pool& pool) {
  EMU_TSAN(EmuIgnore ign;)
  std::vector<Block> blocks(g->cluster);
  const size_t threads = size_t(g->block.x) * g->block.y * g->block.z;
  for (unsigned c = 0; c < g->cluster; ++c) {
    blocks[c].first = blocks.data();
    begin_block(blocks[c], g, {bid.x + c, bid.y, bid.z}, pool, c * threads);
  }
  blocks[0].cluster_alive = unsigned(threads) * g->cluster;
  std::mt19937 rng(g->seed * 7919u + bid.x + 31 * bid.y + 997 * bid.z);
  // adversarial schedule: warps in random order, each run as far as it can get before the next one (lanes shuffled too)
  std::vector<unsigned> wo(blocks[0].w.size()), lo(32);
  for (unsigned i = 0; i < wo.size(); ++i) wo[i] = i;
  for (unsigned i = 0; i < 32; ++i) lo[i] = i;
  for (bool alive = true; alive;) {
    alive = false;
    bool any = false;
    const size_t shift = g->seed && g->cluster > 1 ? rng() : 0;  // which block is first
    for (size_t c = 0; c < blocks.size(); ++c) {
      Block& b = blocks[(c + shift) % blocks.size()];
      if (b.alive) any |= turn(b, rng, wo, lo), alive = true;
    }
    if (alive && !any)
      die("deadlock: threads of a block wait at different barriers (divergent __syncthreads or warp collective)");
  }
  EMU_TSAN(for (Block& b : blocks) __tsan_acquire(&b.alive);)
  blk = nullptr;
}
// ---- barriers ---------------------------------------------------------------------------------
inline void syncthreads() {
  EMU_TSAN(EmuIgnore ign;)
  Block* b = blk;
  const unsigned g = b->gen;
  b->progress = true;
  EMU_TSAN(__tsan_release(&b->sync[g & 1]);)
  if (++b->arrived == b->alive) {
    b->arrived = 0;
    b->gen++;
  } else
    while (b->gen == g) yield();
  EMU_TSAN(__tsan_acquire(&b->sync[g & 1]);)
}
inline void syncwarp(unsigned mask) {
  EMU_TSAN(EmuIgnore ign;)
  Block* b = blk;
  Warp& w = b->w[b->cur->linear / 32];
  const unsigned l = b->cur->linear % 32, g = w.gen[l];
  b->progress = true;
  if (!(mask >> l & 1)) die("warp collective: calling lane is not in its own mask");
  EMU_TSAN(__tsan_release(&w.arr[l]);)
  w.arrived |= 1u << l;
  for (;;) {
    if (w.gen[l] != g) break;
    if ((w.arrived & mask) == (mask & w.alive)) {
      w.arrived &= ~mask;
      w.n++;
      for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) {
          w.gen[i]++;
          w.inst[i] = w.n % 64;
          EMU_TSAN(__tsan_acquire(&w.arr[i]);)
        }
      EMU_TSAN(__tsan_release(&w.ring[w.n % 64]);)
      b->progress = true;
      break;
    }
    yield();
  }
  EMU_TSAN(__tsan_acquire(&w.ring[w.inst[l]]);)
}
template <class T, class F>
inline T exchange(unsigned mask, T v, F src) {
  static_assert(sizeof(T) <= 16);
  EMU_TSAN(EmuIgnore ign;)
  Block* b = blk;
  Warp& w = b->w[b->cur->linear / 32];
  const int l = b->cur->linear % 32;
  std::memcpy(w.slot[l], &v, sizeof(T));
  syncwarp(mask);
  const int s = src(l);
  T r = v;
  if (s >= 0 && s < 32) {
    if (!(mask >> s & 1)) die("shuffle reads a lane that is not in the mask");
    std::memcpy(&r, w.slot[s], sizeof(T));
  }
  syncwarp(mask);
  return r;
}
template <class R, class T, class F>
inline R warp_fold(unsigned mask, T v, R init, F f) {
  EMU_TSAN(EmuIgnore ign;)
  Block* b = blk;
  Warp& w = b->w[b->cur->linear / 32];
  const int l = b->cur->linear % 32;
  std::memcpy(w.slot[l], &v, sizeof(T));
  syncwarp(mask);
  R r = init;
  for (int i = 0; i < 32; ++i)
    if (mask & w.alive & (1u << i)) {
      T t;
      std::memcpy(&t, w.slot[i], sizeof(T));
      r = f(r, t, i);
    }
  syncwarp(mask);
  return r;
}
inline void gridsync() {
  Block* b = blk;
  if (!b->g->gsync) die("grid.sync() in a non-cooperative launch");
  syncthreads();
  if (b->cur->linear == 0) b->g->gsync->arrive_and_wait();  // this block's OS thread stops here: its fibers all wait
  syncthreads();
}
// ---- launch -----------------------------------------------------------------------------------
inline unsigned env_seed() {
  const char* s = std::getenv("CUDA_EMU_SEED");
  return s ? std::atoi(s) : 1;
}
inline cudaError_t launch_impl(dim3 grid, dim3 block, size_t smem, bool coop, std::function<void()> body,
                               unsigned cluster = 1) {
  const size_t nb = size_t(grid.x) * grid.y * grid.z, nt = size_t(block.x) * block.y * block.z;
  if (!nb || !nt || nt > 1024 || grid.y > 65535 || grid.z > 65535 || smem > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  if (coop && nb > 64) return cudaErrorCooperativeLaunchTooLarge;
  if (grid.x % cluster || (coop && cluster > 1)) return cudaErrorInvalidConfiguration;
  Grid g{grid, block, smem, std::move(body), cluster};
  g.seed = env_seed();
  const size_t clusters = nb / cluster, pool = coop ? nb : std::min<size_t>(clusters, 2);
  std::barrier<> gs(static_cast<std::ptrdiff_t>(pool));
  if (coop) g.gsync = &gs;
  std::atomic<size_t> next{0};
  std::vector<std::thread> ts;
  auto own = borrow(pool);
  for (size_t t = 0; t < pool; ++t)
    ts.emplace_back([&, t] {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < clusters;) {
        const size_t j = (g.seed % 2 ? clusters - 1 - i : i) * cluster;  // odd seeds: reverse block order
        run_cluster(&g, {unsigned(j % grid.x), unsigned(j / grid.x % grid.y), unsigned(j / (size_t(grid.x) * grid.y))},
                    *own[t]);
      }
    });
  for (auto& t : ts) t.join();
  give_back(std::move(own));
  return cudaSuccess;
}
inline thread_local cudaError_t last_error = cudaSuccess;
template <class K, class... A>
inline void launch(K k, bool coop, dim3 grid, dim3 block, size_t smem, cudaStream_t, A... a) {
  cudaError_t e = launch_impl(grid, block, smem, coop, [=] { k(a...); });
  if (e != cudaSuccess) last_error = e;
}
template <class T, class U, class F>
inline T rmw(T* p, U v, F f) {
  T o = __atomic_load_n(p, __ATOMIC_RELAXED), n;
  do n = f(o, T(v));
  while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return o;
}
template <class F, class I>
inline F rmw_float(F* p, F v, auto f) {
  I* q = reinterpret_cast<I*>(p);
  I o = __atomic_load_n(q, __ATOMIC_RELAXED), n;
  F of;
  do {
    std::memcpy(&of, &o, sizeof o);
    F nf = f(of, v);
    std::memcpy(&n, &nf, sizeof n);
  } while (!__atomic_compare_exchange_n(q, &o, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return of;
}
}  // namespace cuda_emu

#define threadIdx (::cuda_emu::blk->cur->tid)
#define blockIdx (::cuda_emu::blk->bid)
#define blockDim (::cuda_emu::blk->g->block)
#define gridDim (::cuda_emu::blk->g->grid)
#define warpSize 32
inline void __syncthreads() { cuda_emu::syncthreads(); }
inline void __syncwarp(unsigned m = ~0u) { cuda_emu::syncwarp(m); }
// TSan does not know fences: an exchange that changes nothing orders as much and is one that it knows, a
// synchronisation point of all who fence (may hide a race, never invents one).
inline std::atomic<int> emu_fence{0};
inline void __threadfence() { emu_fence.fetch_add(0, std::memory_order_seq_cst); }
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __shfl_sync(unsigned m, T v, int s, int w = 32) {
  return cuda_emu::exchange(m, v, [=](int l) { return (l & ~(w - 1)) + (s & (w - 1)); });
}
template <class T>
T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  return cuda_emu::exchange(m, v, [=](int l) {
    int s = l + int(d);
    return (l & (w - 1)) + int(d) < w ? s : l;
  });
}
template <class T>
T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  return cuda_emu::exchange(m, v, [=](int l) { return (l & (w - 1)) - int(d) >= 0 ? l - int(d) : l; });
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  return cuda_emu::exchange(m, v, [=](int l) {
    int s = l ^ x;
    return (s & ~(w - 1)) <= (l & ~(w - 1)) ? s : l;
  });
}
inline unsigned __ballot_sync(unsigned m, int p) {
  return cuda_emu::warp_fold(m, p, 0u, [](unsigned r, int v, int i) { return v ? r | 1u << i : r; });
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) {
  return cuda_emu::warp_fold(m, p, 1, [](int r, int v, int) { return r && v; });
}
inline int __syncthreads_or(int p) {
  static thread_local int acc;
  __syncthreads();
  if (!cuda_emu::blk->cur->linear) acc = 0;
  __syncthreads();
  if (p) __atomic_store_n(&acc, 1, __ATOMIC_RELAXED);
  __syncthreads();
  return acc;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T>
T atomicAdd(T* p, T v) {
  if constexpr (std::is_same_v<T, float>)
    return cuda_emu::rmw_float<float, uint32_t>(p, v, std::plus<>());
  else if constexpr (std::is_same_v<T, double>)
    return cuda_emu::rmw_float<double, uint64_t>(p, v, std::plus<>());
  else
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, T v) {
  return cuda_emu::rmw(p, v, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T atomicMin(T* p, T v) {
  return cuda_emu::rmw(p, v, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T atomicExch(T* p, T v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T c, T v) {
  __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return c;
}
template <class A, class B>
auto min(A a, B b) -> std::common_type_t<A, B> {
  using C = std::common_type_t<A, B>;
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
auto max(A a, B b) -> std::common_type_t<A, B> {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(b) : C(a);
}
namespace cooperative_groups {
struct grid_group {
  void sync() const { cuda_emu::gridsync(); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
// the few runtime calls a launcher needs
inline cudaError_t emu_cudaGetLastError() {
  auto e = cuda_emu::last_error;
  cuda_emu::last_error = cudaSuccess;
  return e;
}
#define cudaGetLastError emu_cudaGetLastError
#define ZF_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::cuda_emu::shared_base(::cuda_emu::blk))
#define ZF_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::cuda_emu::launch([](const auto&... a) { kernel(a...); }, false, dim3(grid), dim3(block), smem, stream, __VA_ARGS__)
#define ZF_LAUNCH_COOP(kernel, grid, block, smem, stream, ...) \
  ::cuda_emu::launch([](const auto&... a) { kernel(a...); }, true, dim3(grid), dim3(block), smem, stream, __VA_ARGS__)
