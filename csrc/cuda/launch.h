// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels: plain pointers and a stream, no torch types, implemented in the .cu files.  Arguments
// of a list op travel by value in one struct, so that one launch serves many spaces and no descriptor is copied to the
// device (which would break graph capture).  Kernel arguments are limited in size (4 KB, since CUDA 12.1 32 KB); the
// glue cuts longer lists into launches.
#pragma once
#ifdef ZF_EMU
#include "../emu/cuda_emu.h"
#else
#include <cuda_runtime_api.h>
#endif
#include <cstdint>

#include "cuda/moments_packed.h"
#include "dtype.h"
#include "rule.h"

namespace zipfast::cuda {

// --- blend_, multidot, gram
// ------------------------------------------------------------------------------------------- Lists of tensors of k
// models. Pointers travel in the kernel's arguments (32 KB since CUDA 12.1); the glue cuts longer lists into launches.
constexpr int kSoupPointers = 1536, kSoupTensors = 256;
#ifdef ZF_EMU
constexpr int kSoupThreads = 32;
constexpr long long kSoupPiece = 96;  // small: tests are to see several pieces
#else
constexpr int kSoupThreads = 256;
constexpr long long kSoupPiece = 8192;
#endif

struct SoupTensor {
  long long size, first;  // elements; first of its ceil(size / kSoupPiece) blocks
};
struct SoupList {
  const void* x[kSoupPointers];  // [tensors, models]
  SoupTensor tensor[kSoupTensors];
  uint8_t dtype[kSoupPointers];
  int models, tensors;
  int stride, column;  // tensors of the whole call, and which of them is the first here
  long long blocks;
};
struct SoupPlace {
  int tensor;
  long long begin, end;  // elements
};
template <class List>
ZF_HD inline SoupPlace soup_place(const List& list, long long block) {
  int low = 0, high = list.tensors - 1;  // the last tensor whose first block is at or before this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.tensor[middle].first <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const long long begin = (block - list.tensor[low].first) * kSoupPiece, size = list.tensor[low].size;
  return {low, begin, begin + kSoupPiece < size ? begin + kSoupPiece : size};
}

struct BlendJob {
  SoupList list;
  void* out[kSoupTensors];
  const double* weight;  // [models, stride]
  long long* bad;        // [models + 1, stride]
  uint8_t target[kSoupTensors], wide[kSoupTensors];
};
cudaError_t blend(const BlendJob& job, cudaStream_t stream);

struct MultidotJob {
  SoupList list;
  const void* g[kSoupTensors];
  double* part;  // [blocks, models]
  double* out;   // [models, stride]
  uint8_t g_dtype[kSoupTensors];
};
cudaError_t multidot(const MultidotJob& job, cudaStream_t stream);

struct GramJob {
  SoupList list;
  const void* base[kSoupTensors];  // null: zeros
  double* part;                    // [blocks, models, models]
  double* out;                     // [stride, models, models]
  uint8_t base_dtype[kSoupTensors], wide[kSoupTensors];
};
cudaError_t gram(const GramJob& job, cudaStream_t stream);

// --- apply_mask_, masked_step_
// ------------------------------------------------------------------------------------------- Lists of tensors with
// packed masks, cut into launches of kSoupTensors and into blocks as the soups are.
struct ApplyTensor {
  void* out;
  const void* source;   // may be `out`
  const uint8_t* mask;  // null: all alive
  long long size, first;
  int width;     // bytes of an element
  bool aligned;  // 16-byte accesses are allowed
};
struct ApplyJob {
  ApplyTensor tensor[kSoupTensors];
  int tensors;
  long long blocks;
};
cudaError_t apply_mask(const ApplyJob& job, cudaStream_t stream);

struct StepTensor {
  void* param;
  void *moment, *square;  // null: none
  const void* grad;
  const uint8_t* mask;  // null: all alive
  long long size, first;
  uint8_t dtype, state;
  bool aligned;
};
struct StepJob {
  StepTensor tensor[kSoupTensors];
  rule::StepRule<double> wide;
  rule::StepRule<float> single;
  int flags, tensors;
  rule::StepKind kind;
  long long blocks;
};
cudaError_t masked_step(const StepJob& job, cudaStream_t stream);

// --- evidence
// ---------------------------------------------------------------------------------------------------------
constexpr int kEvidenceProblems = 20, kEvidenceLanes = 32;

struct EvidenceProblem {
  rule::EvidenceRule rule;    // its trace is formed on the device
  const double* diagonal;     // [k]
  const double* offdiagonal;  // [k - 1] or null
  const double* projected;    // [k, outputs]
  const double* square;       // [outputs]
  double* mean;               // [k, outputs] or null
  double* scratch;            // tridiagonal: [2, k, outputs]
  long long k, outputs, first;
  int block;  // first of its ceil(outputs / kEvidenceLanes) blocks
};
struct EvidenceJob {
  EvidenceProblem problem[kEvidenceProblems];
  double* value;      // [kEvidenceValues, all]
  long long* status;  // [kEvidenceStatus, all]
  long long all;
  int problems, blocks;
  bool tridiagonal;
};
cudaError_t evidence(const EvidenceJob& job, cudaStream_t stream);

// --- moments_
// ---------------------------------------------------------------------------------------------------------
constexpr int kMomentsSpaces = 16, kMomentsPointers = 96, kMomentsTile = 64;

struct MomentsSpace {
  int64_t outer, size, inner, seen;
  const double* shift;  // [F]
  double* comoment;     // [F, F]
  double* total;        // [F]
  long long* bad;       // [M]
  int pointer;          // first of its M entries in MomentsJob::x
  int tiles;            // tiles of the upper triangle
  int splits;           // parts of the samples; more than one go through `partial`
  int block;            // first block of the products
  int64_t partial;      // first entry in MomentsJob::partial
};
struct MomentsJob {
  MomentsSpace space[kMomentsSpaces];
  const void* x[kMomentsPointers];
  double* partial;  // per block with splits > 1: tile [64, 64], then sums [64]
  int spaces, models, blocks;
};
// Tiles along a side, parts of the samples, float64 entries of scratch: by shape alone.
ZF_HD inline int64_t moments_side(int64_t features) { return (features + kMomentsTile - 1) / kMomentsTile; }
inline int moments_splits(int64_t tiles, int64_t samples) {
  const int64_t wanted = (samples + 2047) / 2048, most = 528 / tiles < 1 ? 1 : 528 / tiles;
  return int(wanted < 1 ? 1 : wanted < most ? wanted : most);
}
constexpr int64_t kMomentsPartial = kMomentsTile * kMomentsTile + kMomentsTile;
cudaError_t moments(DType dtype, const MomentsJob& job, cudaStream_t stream);
cudaError_t moments_packed(DType dtype, const PackedJob& job, cudaStream_t stream);

// --- regroup
// ----------------------------------------------------------------------------------------------------------
constexpr int kRegroupPointers = 64;

struct RegroupJob {
  const void* x[kRegroupPointers];  // M tensors [outer, size, inner]
  const int64_t* order;             // [members]
  const int64_t* start;             // [groups + 1]
  const double* divisor;            // [groups] or null
  void* out;                        // [outer, groups, inner]
  int64_t outer, size, inner, groups, members, models;
};
cudaError_t regroup(DType dtype, const RegroupJob& job, cudaStream_t stream);

// --- threshold
// --------------------------------------------------------------------------------------------------------
constexpr int kThresholdTensors = 384, kThresholdGroups = 256;
#ifdef ZF_EMU
constexpr int kThresholdThreads = 64, kThresholdCopies = 1;
constexpr long long kThresholdPiece = 256;  // small: tests are to see several pieces
#else
constexpr int kThresholdThreads = 256, kThresholdCopies = 4;
constexpr long long kThresholdPiece = 16384;
#endif

struct ThresholdTensor {
  const void* data;
  const uint8_t* mask;  // null: all alive
  uint32_t* kept;       // 16 * ceil(size / 512) words
  long long size;
  long long first;  // of its ceil(size / kThresholdPiece) blocks in this launch
  int index, group;
  DType dtype;
};
struct ThresholdGroup {  // on the device
  long long drop;
  long long first, blocks;  // its part of `part`
  long long survivors;
  long long rank;    // from 1, among the keys that begin with `prefix`; at last the equal ones that go
  long long prefix;  // of the key wanted, at last all of it; -1: nothing goes
  long long equal;   // keys that begin with `prefix`
  int bits;
};
struct ThresholdBegin {
  ThresholdGroup group[kThresholdGroups];
  ThresholdGroup* state;    // [all groups]
  unsigned long long* bin;  // [all groups, kThresholdBins]
  long long* status;        // [tensors + all groups]
  int first, groups;        // of these
  int tensors;
};
struct ThresholdJob {
  ThresholdTensor tensor[kThresholdTensors];
  ThresholdGroup* state;
  unsigned long long* bin;
  long long* part;    // [all blocks]: ties of each; then those in the blocks before it
  long long* status;  // [tensors + groups]
  long long column;   // blocks of the launches before
  long long blocks;
  int tensors;
};
struct ThresholdGroups {
  ThresholdGroup* state;
  unsigned long long* bin;
  long long* part;
  long long* survivors;  // of status
  int groups;
};
cudaError_t threshold_begin(const ThresholdBegin& job, cudaStream_t stream);
cudaError_t threshold_count(const ThresholdJob& job, int pass, cudaStream_t stream);
cudaError_t threshold_pick(const ThresholdGroups& job, int pass, cudaStream_t stream);
cudaError_t threshold_ties(const ThresholdJob& job, cudaStream_t stream);
cudaError_t threshold_share(const ThresholdGroups& job, cudaStream_t stream);
cudaError_t threshold_write(const ThresholdJob& job, cudaStream_t stream);

// --- sparse_linear
// ----------------------------------------------------------------------------------------------------
constexpr int kSparseFew = 16;  // samples up to which a warp gathers from them as they lie
#ifdef ZF_EMU
constexpr int kSparseThreads = 64;
#else
constexpr int kSparseThreads = 256;
#endif

struct SparseJob {
  const int32_t* row_start;  // [rows + 1]
  const void* column;        // [alive] uint16 or int32
  const int32_t* order;      // [alive], where values lie, or null: in their own place
  const void* value;         // [alive]
  const void* bias;          // [rows] or null
  const void* x;             // [batch, columns]
  const void* grad;          // [batch, rows], of the weight gradient
  void* packed_x;            // [columns, batch] where batch > kSparseFew
  void* packed_grad;         // [rows, batch] likewise, of the weight gradient
  void* out;                 // [batch, rows] or [alive]
  long long rows, columns, alive, batch;
  bool narrow;
};
cudaError_t sparse_linear(DType dtype, const SparseJob& job, cudaStream_t stream);
cudaError_t sparse_linear_weight(DType dtype, const SparseJob& job, cudaStream_t stream);

// --- zip_match
// --------------------------------------------------------------------------------------------------------
constexpr int kMatchSpaces = 32;

struct MatchSpace {
  const void* sim;  // [n, n]
  int64_t* group;   // [n]
  int64_t* pair;    // [n - keep, 2]
  void* value;      // [n - keep]
  int64_t* status;  // [kStatusFields]
  int64_t budget;
  int n, keep;
};
struct MatchJob {
  MatchSpace space[kMatchSpaces];
  void* scratch;  // zip_match_scratch(dtype, largest n) bytes
  double alpha;
  int spaces, models, largest;
  bool compat;
};
int64_t zip_match_scratch(DType dtype, int64_t largest);
cudaError_t zip_match(DType dtype, const MatchJob& job, cudaStream_t stream);

}  // namespace zipfast::cuda
