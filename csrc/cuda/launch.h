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
// A piece is what a block collects from, a span what one of its warps does, 256 elements at a time.  Of the keys inside
// a group's bracket a span keeps up to kThresholdCandidates aside; one that has more is read again.
constexpr int kThresholdTensors = 384, kThresholdGroups = 256, kThresholdCandidates = 128, kThresholdBlocks = 1024;
#ifdef ZF_EMU  // small: tests are to see several pieces, spans with too many candidates and brackets that miss
constexpr int kThresholdThreads = 64, kThresholdWide = 64, kThresholdFinish = 64, kThresholdSpan = 512,
              kThresholdSamples = 4, kThresholdCopies = 1;
constexpr double kThresholdSigmas = 1, kThresholdSlack = 2;
#else
constexpr int kThresholdThreads = 256, kThresholdWide = 1024, kThresholdFinish = 512, kThresholdSpan = 2048,
              kThresholdSamples = 16, kThresholdCopies = 4;
constexpr double kThresholdSigmas = 4, kThresholdSlack = 8;
#endif
constexpr int kThresholdSpans = kThresholdThreads / 32, kThresholdPiece = kThresholdSpan * kThresholdSpans;

struct ThresholdTensor {  // of those with elements, group after group
  const void* data;
  const uint8_t* mask;  // null: all alive
  uint32_t* kept;       // 16 * ceil(size / 512) words
  long long size;
  long long before;  // elements of its group before it
  int first;         // of its ceil(size / kThresholdPiece) pieces
  int index, group;
  uint8_t dtype;
  bool aligned;  // 16-byte accesses are allowed
};
struct ThresholdGroup {
  long long drop, size;
  long long low, high;  // the bracket: survivors from `high` on stay, those below `low` go
  long long rank;       // from 1, among the keys less `low` that begin with `prefix`; at last the equal ones that go
  long long prefix;     // of the key wanted, less `low`; at last all of it; -1: all inside the bracket stay
  long long equal;      // keys that begin with `prefix`
  int tensor, tensors;  // rows of the table
  int piece, pieces;
  int bits;     // of the largest key less `low`
  bool missed;  // the bracket: it is everything now, and nothing was kept aside
  uint8_t dtype;
};
struct ThresholdTotal {
  unsigned long long alive, above, inside;
};
struct ThresholdJob {        // everything on the device, of all launches
  ThresholdTensor* table;    // [rows]
  ThresholdGroup* state;     // [groups]
  ThresholdTotal* total;     // [groups]
  unsigned long long* bin;   // [groups, kThresholdBins]
  unsigned char* key;        // [spans, kThresholdCandidates] of `width` bytes, less `low`
  uint16_t* place;           // [spans, kThresholdCandidates], in the span
  unsigned* count;           // [spans] inside the bracket, kept aside or not
  unsigned* ties;            // [spans] that equal the threshold
  int* row;                  // [pieces]: of the table
  unsigned long long* last;  // [kThresholdBlocks]: ties of the last group that a block has spans of
  unsigned* ticket;          // blocks done
  int* passes;               // digits left to count
  long long* status;         // [inputs + groups]
  int rows, groups, inputs, pieces, width;
};
struct ThresholdBegin {
  ThresholdTensor tensor[kThresholdTensors];
  struct {
    long long drop;
    int tensor, tensors;
  } group[kThresholdGroups];
  ThresholdJob job;
  int row, rows;      // first and number of `tensor`
  int first, groups;  // of `group`
};
cudaError_t threshold_begin(const ThresholdBegin& job, cudaStream_t stream);  // of all, in one launch or in several
cudaError_t threshold_bracket(const ThresholdJob& job, cudaStream_t stream);  // if there were several
cudaError_t threshold_collect(const ThresholdJob& job, cudaStream_t stream);
cudaError_t threshold_finish(const ThresholdJob& job, cudaStream_t stream);

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
