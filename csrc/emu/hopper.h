// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/cuda/hopper.cuh on the host.
//   * mbarrier: counts of arrivals and bytes in the object's own eight bytes; a thread that waits gives way to others.
//   * Bulk copies run when they are issued: the earliest moment allowed, so that a stage given back too soon is
//     overwritten under its readers.
//   * wgmma runs when it is waited for: the latest moment allowed, so that a missing wait, or a stage given back before
//     it, shows as a wrong result.  Operands are found through the matrix descriptors alone, swizzled by address as the
//     hardware does it.  Sums of 16 products are exact, then added and cut off, not rounded.
//   * Under the thread sanitizer an arrival releases and a wait acquires; nothing else here synchronises.
#pragma once
#include <unordered_map>

#include "../dtype.h"
#include "cuda_emu.h"
#include "tensor_core.h"

namespace cuda_emu {

// Addresses of shared memory count from the block's own, as on a GPU.
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - shared_base(block_here()));
}
inline char* shared_pointer(Block* b, uint32_t address) {
  if (address >= b->g->smem) die("an address of shared memory lies outside of it");
  return shared_base(b) + address;
}

// ---- clusters -----------------------------------------------------------------------------------------------------
inline unsigned cluster_rank() { return unsigned(blk - blk->first); }
inline Block* cluster_block(unsigned rank) { return blk->first + rank; }
inline void cluster_sync() {
  EMU_TSAN(EmuIgnore ign;)
  Block *b = blk, *first = b->first;
  const unsigned g = first->cluster_gen;
  b->progress = true;
  EMU_TSAN(__tsan_release(&first->sync[g & 1]);)
  if (++first->cluster_arrived == first->cluster_alive) {
    first->cluster_arrived = 0;
    first->cluster_gen++;
  } else
    while (first->cluster_gen == g) yield();
  EMU_TSAN(__tsan_acquire(&first->sync[g & 1]);)
}

// ---- mbarrier -----------------------------------------------------------------------------------------------------
struct Barrier {
  int32_t bytes;
  int16_t pending;
  uint8_t count, phase;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier* barrier_at(Block* b, uint32_t address) {
  if (address % 8) die("an mbarrier must be aligned to 8 bytes");
  return reinterpret_cast<Barrier*>(shared_pointer(b, address));
}
inline void settle(Barrier* bar) {
  blk->progress = true;
  if (bar->pending < 0) die("more arrivals at an mbarrier than it counts");
  if (bar->pending || bar->bytes) return;
  bar->phase ^= 1;
  bar->pending = bar->count;
}
inline void barrier_init(uint32_t address, unsigned count) {
  EMU_TSAN(EmuIgnore ign;)
  *barrier_at(blk, address) = {0, int16_t(count), uint8_t(count), 0};
}
inline void barrier_arrive(Block* b, uint32_t address, int32_t bytes) {
  EMU_TSAN(EmuIgnore ign;)
  Barrier* bar = barrier_at(b, address);
  EMU_TSAN(__tsan_release(bar);)
  bar->bytes += bytes;
  bar->pending--;
  settle(bar);
}
inline void barrier_bytes(Block* b, uint32_t address, int32_t bytes) {
  EMU_TSAN(EmuIgnore ign;)
  Barrier* bar = barrier_at(b, address);
  EMU_TSAN(__tsan_release(bar);)
  bar->bytes -= bytes;
  settle(bar);
}
inline void barrier_wait(uint32_t address, unsigned parity) {
  EMU_TSAN(EmuIgnore ign;)
  Barrier* bar = barrier_at(blk, address);
  if (bar->phase == parity) {
    while (bar->phase == parity) yield();
    blk->progress = true;
  }
  EMU_TSAN(__tsan_acquire(bar);)
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar, unsigned mask) {
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) die("a bulk copy must be of aligned 16 bytes");
  for (unsigned c = 0; mask >> c; ++c)
    if (mask >> c & 1) {
      Block* b = cluster_block(c);
      shared_pointer(b, to + bytes - 1);
      std::memcpy(shared_pointer(b, to), from, bytes);
      barrier_bytes(b, bar, int32_t(bytes));
    }
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
struct Product {
  float* d;  // 64 accumulators of one thread
  uint64_t a, b;
  float (*widen)(uint16_t);
  bool accumulate;
};
struct Products {
  std::vector<Product> open;                    // not committed yet
  std::vector<std::vector<Product>> committed;  // oldest first
  unsigned waits = 0;
};
[[gnu::noinline]] inline Products& products_here() {
  EMU_TSAN(EmuIgnore ign;)  // one table for all fibers of an OS thread; its entries are their own
  static thread_local std::unordered_map<Fiber*, Products> all;
  return all[block_here()->cur];
}

// 16 numbers of one row, widened; most of what tests multiply is padding, which need not be.
struct Row {
  float value[16];
  bool zero = true, finite = true;
};
// Row r of a K-major operand with the 128-byte swizzle.
inline void read_row(uint64_t descriptor, unsigned r, float (*widen)(uint16_t), Row& row) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) die("wgmma: only the 128-byte swizzle is emulated");
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  uint32_t bits = 0;
  for (unsigned unit = 0; unit < 2; ++unit) {
    uint32_t at = start + r / 8 * stride + r % 8 * 128 + unit * 16;
    at ^= (at >> 7 & 7) << 4;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(shared_pointer(blk, at));
    for (int k = 0; k < 8; ++k) {
      bits |= x[k];
      row.value[unit * 8 + k] = x[k] ? widen(x[k]) : 0;
    }
  }
  row.zero = !bits;
  float none = 0;
  for (float v : row.value) none += v - v;
  row.finite = none == 0;
}
inline void run(const Product& p) {
  const unsigned thread = blk->cur->linear % 128, row = thread / 32 * 16 + thread % 32 / 4, col = thread % 4 * 2;
  Row a[2], b;
  for (int h = 0; h < 2; ++h) read_row(p.a, row + 8 * h, p.widen, a[h]);
  for (unsigned c = 0; c < 32; ++c) {
    read_row(p.b, c / 2 * 8 + col + c % 2, p.widen, b);
    for (int h = 0; h < 2; ++h) {
      double sum = 0;
      if (!(a[h].zero && b.finite) && !(b.zero && a[h].finite))
        for (int k = 0; k < 16; ++k) sum += double(a[h].value[k]) * double(b.value[k]);
      float& d = p.d[c / 2 * 4 + h * 2 + c % 2];
      d = cut_off(p.accumulate ? sum + double(d) : sum);
    }
  }
}
inline void wgmma_issue(const Product& p) {
  EMU_TSAN(EmuIgnore ign;)
  products_here().open.push_back(p);
}
inline void wgmma_commit() {
  EMU_TSAN(EmuIgnore ign;)
  Products& all = products_here();
  all.committed.push_back(std::move(all.open));
  all.open.clear();
}
// The products that have to be through; now and then all other threads go first.
inline std::vector<Product> wgmma_due(size_t most) {
  EMU_TSAN(EmuIgnore ign;)
  Products& all = products_here();
  if (all.committed.size() > most && ++all.waits % 4 == blk->cur->linear % 4)
    for (const unsigned turns = blk->turns; blk->turns - turns < 2; yield()) blk->later = true;
  std::vector<Product> due;
  while (all.committed.size() > most) {
    due.insert(due.end(), all.committed.front().begin(), all.committed.front().end());
    all.committed.erase(all.committed.begin());
  }
  return due;
}
inline void wgmma_wait(size_t most) {
  for (const Product& p : wgmma_due(most)) run(p);
}

template <class K, class... A>
inline void launch_cluster(K k, unsigned cluster, dim3 grid, dim3 block, size_t smem, A... a) {
  cudaError_t e = launch_impl(grid, block, smem, false, [=] { k(a...); }, cluster);
  if (e != cudaSuccess) last_error = e;
}

}  // namespace cuda_emu
