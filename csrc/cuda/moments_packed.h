// SPDX-License-Identifier: Apache-2.0
// How the "wgmma" path of moments_ cuts its work: by the shape of a space alone, so that its results do not depend on
// what else is in the call.
//
// Samples are taken in groups of 256.  A slab is as many groups of a space as its operands may take memory; slabs of
// several spaces share a wave: one launch each that packs, multiplies and adds up.  Tiles of 128 x 128 of the upper
// triangle are multiplied in pairs, one pair by two blocks (a cluster) that read what both need once: tiles one below
// the other share their columns.  What a column of tiles leaves over is a tile on the diagonal; these are paired among
// themselves and share nothing.  Pairs that fill all clusters go through all groups of the slab and add to the
// co-moment themselves; the groups of the rest are split, and the parts are added in order by another kernel.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace zipfast::cuda {

constexpr int kPackedTile = 128, kPackedGroup = 256, kPackedRows = 32, kPackedSpaces = 16, kPackedPointers = 96;
#ifdef ZF_EMU  // small: tests are to see several slabs, rounds, parts and sums
constexpr int kPackedClusters = 2, kPackedSums = 6;
constexpr int64_t kPackedBytes = int64_t(2) << 20;
#else
constexpr int kPackedClusters = 66;  // two of the 132 multiprocessors of an H100 or H200 each
constexpr int kPackedSums = 64;      // groups that float32 sums may grow for, to 16384 samples
constexpr int64_t kPackedBytes = int64_t(256) << 20;
#endif

struct PackedPlan {
  int64_t padded;          // features, to whole tiles
  int side, pairs, whole;  // tiles along a side; pairs of tiles, and those that are not split
  int splits;              // parts of each of the others
  ZF_HD int rest() const { return pairs - whole; }
  ZF_HD int items() const { return whole + rest() * splits; }
};

inline PackedPlan packed_plan(int64_t features, int64_t groups) {
  PackedPlan p{};
  p.side = int((features + kPackedTile - 1) / kPackedTile);
  p.padded = int64_t(p.side) * kPackedTile;
  p.pairs = p.side * p.side / 4 + ((p.side + 1) / 2 + 1) / 2;
  p.whole = p.pairs - p.pairs % kPackedClusters;
  p.splits = 1;
  int64_t best = -1;
  for (int64_t n = 1; n <= groups && n <= 4 * kPackedClusters && p.rest(); ++n) {
    // In 1/32 of the time of one group: rounds of parts and their ends; writing and reading a part takes one.
    const int64_t rounds = (p.rest() * n + kPackedClusters - 1) / kPackedClusters, longest = (groups + n - 1) / n;
    const int64_t cost = 32 * rounds * (longest + 1) + (n > 1 ? p.rest() * n : 0);
    if ((n == 1 || longest <= kPackedSums) && (best < 0 || cost < best)) best = cost, p.splits = int(n);
  }
  if (p.splits == 1) p.whole = p.pairs;
  return p;
}

// Groups of a slab: equal parts of all, of which high and low halves of the operands take kPackedBytes at most.
inline int64_t packed_slab(int64_t features, int64_t groups) {
  const int64_t padded = (features + kPackedTile - 1) / kPackedTile * kPackedTile;
  const int64_t most = kPackedBytes / (padded * kPackedGroup * 4), limit = most < 1 ? 1 : most;
  const int64_t slabs = (groups + limit - 1) / limit;
  return (groups + slabs - 1) / slabs;
}

struct PackedSpace {
  int64_t outer, size, inner, seen;
  int64_t begin, end;   // samples of this slab
  const double* shift;  // [F]
  double* comoment;     // [F, F]
  double* total;        // [F]
  long long* bad;       // [M]
  PackedPlan plan;
  int groups;
  int pointer;                   // first of its M entries in PackedJob::x
  int vector;                    // neighbouring samples that may be read at once: 1, 4 or 8
  int pack, item, sum;           // first of its blocks, work items, blocks of the sums
  int64_t image;                 // first byte of [2, groups, 4, padded, 64] numbers of two bytes
  int64_t scale, rows, partial;  // first entries of [groups, padded]; [groups, F]; [rest * splits, 2, 128, 128]
};
struct PackedJob {
  PackedSpace space[kPackedSpaces];
  const void* x[kPackedPointers];
  unsigned char* image;
  float* scale;    // what the operands of a row must be multiplied by
  double* rows;    // sums of the features, a group each
  float* partial;  // in the order of the accumulators
  int* plain;      // [spaces]: operands are the inputs themselves
  int spaces, models, pack_blocks, items, sum_blocks;
};

}  // namespace zipfast::cuda
