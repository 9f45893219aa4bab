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
#include <type_traits>

#include "cuda/moments_packed.h"
#include "dtype.h"
#include "rule.h"

namespace zipfast::cuda {

// --- blend_, multidot, gram
// ------------------------------------------------------------------------------------------- Lists of tensors of k
// models. Pointers travel in the kernel's arguments (32 KB since CUDA 12.1); the glue cuts longer lists into launches.
constexpr int kSoupPointers = 1536, kSoupTensors = 256;
#ifdef ZF_EMU
constexpr int kSoupThreads = 64;  // small: tests are to see several pieces, and two warps in each
#else
constexpr int kSoupThreads = 256;
#endif
constexpr int kSoupEach = 16;  // elements of a piece that a thread has to itself
constexpr long long kSoupPiece = (long long)kSoupThreads * kSoupEach;

constexpr uint8_t kMixed = 255;

struct SoupTensor {
  long long size, first;  // elements; first of its ceil(size / kSoupPiece) blocks
};
struct SoupList {
  const void* x[kSoupPointers];  // [tensors, models]
  SoupTensor tensor[kSoupTensors];
  uint8_t dtype[kSoupPointers];
  uint8_t same[kSoupTensors];     // the dtype of all that belongs to a tensor, or kMixed
  uint8_t aligned[kSoupTensors];  // 16-byte accesses are allowed
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
  using Entry = std::decay_t<decltype(*list.tensor)>;
  const int low = rule::entry_of<&Entry::first>(list.tensor, list.tensors, block);
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
  double* part;  // [models, blocks]
  double* out;   // [models, stride]
  uint8_t g_dtype[kSoupTensors];
};
cudaError_t multidot(const MultidotJob& job, cudaStream_t stream);

struct GramJob {
  SoupList list;
  const void* base[kSoupTensors];  // null: zeros
  double* part;                    // [models (models + 1) / 2, blocks]
  double* out;                     // [stride, models, models]
  uint8_t base_dtype[kSoupTensors], wide[kSoupTensors];
};
// Whether path "tensor" serves where a call leaves the choice: tensor cores that multiply float64 faster than all else,
// and models enough to fill half of an operand.
inline bool gram_by_tensor_cores(int capability, long long models) {
  return (capability == 80 || capability == 90 || capability == 100) && models >= 4;
}
cudaError_t gram(const GramJob& job, bool tensor, cudaStream_t stream);

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
// An output belongs to a team of threads, a power of two of them; a block holds kEvidenceThreads (tridiagonal:
// kEvidenceChain) threads, so one or several teams.  352 problems fill the 32 KB of arguments.
#ifdef ZF_EMU
constexpr int kEvidenceProblems = 20, kEvidenceThreads = 64, kEvidenceChain = 64;  // small: tests are to see them all
constexpr int kEvidenceTerms = 2, kEvidenceLinks = 2, kEvidenceFull = 512;
#else
constexpr int kEvidenceProblems = 352, kEvidenceThreads = 512, kEvidenceChain = 128;
constexpr int kEvidenceTerms = 4, kEvidenceLinks = 16;  // rows of a thread at least; joining two threads costs two rows
constexpr int kEvidenceFull = 65536;  // threads of a problem that fill a GPU; tridiagonal: half of them
#endif

struct EvidenceProblem {
  const double* diagonal;     // [k]
  const double* offdiagonal;  // [k - 1] or null
  const double* projected;    // [k, outputs]
  const double* square;       // [outputs]
  double* mean;               // [k, outputs] or null
  double* scratch;            // [outputs, evidence_rows(k, team)]
  double samples, features;
  long long first;  // of its outputs among all
  int k, outputs;
  int block;  // first of its blocks
  int team;   // 2^team threads for an output
};
struct EvidenceJob {
  EvidenceProblem problem[kEvidenceProblems];
  double* value;      // [kEvidenceValues, all]
  long long* status;  // [kEvidenceStatus, all]
  long long all;
  double tolerance, epsilon, floor;
  int mode, most;
  int problems, blocks;
  bool tridiagonal;
};
static_assert(sizeof(EvidenceJob) <= 32764, "arguments of a kernel");
// By a problem's own shape alone: its results do not depend on what else is in the list.
inline int evidence_team(bool tridiagonal, int64_t k, int64_t outputs) {
  const int64_t threads = tridiagonal ? kEvidenceChain : kEvidenceThreads;
  const int64_t rows = tridiagonal ? kEvidenceLinks : kEvidenceTerms;
  const int64_t full = tridiagonal ? kEvidenceFull / 2 : kEvidenceFull;
  int team = 0;
  for (int64_t size = 2; size <= threads && size * rows <= k && size * outputs <= full; size *= 2) ++team;
  return team;
}
inline int64_t evidence_blocks(bool tridiagonal, int64_t outputs, int team) {
  const int64_t teams = (tridiagonal ? kEvidenceChain : kEvidenceThreads) >> team;
  return (outputs + teams - 1) / teams;
}
// A team's rows, as many for each of its threads.
ZF_HD inline long long evidence_rows(long long k, int team) {
  const long long size = 1ll << team;
  return (k + size - 1) / size * size;
}
cudaError_t evidence(const EvidenceJob& job, cudaStream_t stream);

// --- moments_
// ---------------------------------------------------------------------------------------------------------
constexpr int kMomentsTile = 64;
#ifdef ZF_EMU
constexpr int kMomentsSpaces = 16, kMomentsPointers = 96;  // few: tests are to see several launches
#else
constexpr int kMomentsSpaces = 64, kMomentsPointers = 256;
#endif

// generic: every device and dtype.  mma: tensor cores of compute capability 8.0 and newer.  wgmma: those of 9.0.
enum class MomentsPath { generic, mma, wgmma };
constexpr int64_t kMmaMostSamples = (int64_t(1) << 31) - 32768;  // path mma counts them in 32 bits
// Fewer features, or samples, cost more to pack than their products take.
constexpr int64_t kPackedFeatures = 512, kPackedSamples = 4 * kPackedGroup;
// What "auto" takes, by the paths that the device at hand has code for, dtype, stacked features and samples.
struct MomentsCode {
  bool mma, wgmma;
};
inline MomentsPath moments_path(MomentsCode code, DType dtype, int64_t features, int64_t samples) {
  if (dtype == DType::f64) return MomentsPath::generic;
  if (code.wgmma && features >= kPackedFeatures && samples >= kPackedSamples) return MomentsPath::wgmma;
  return code.mma && samples <= kMmaMostSamples ? MomentsPath::mma : MomentsPath::generic;
}
// What was loaded for the current device: a build without code for its generation runs there, too, from older code.
MomentsCode moments_code(int capability);

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
  int reduce;           // first block of the reduction
  int64_t partial;      // first entry in MomentsJob::partial
};
struct MomentsJob {
  MomentsSpace space[kMomentsSpaces];
  const void* x[kMomentsPointers];
  double* partial;  // per block with splits > 1: sums [64], then its tile [64, 64] (path mma: in float32)
  int spaces, models, blocks, reduce_blocks;
};
// By shape alone: tiles along a side, parts of the samples, float64 entries of scratch.
ZF_HD inline int64_t moments_side(int64_t features) { return (features + kMomentsTile - 1) / kMomentsTile; }
inline int moments_splits(MomentsPath path, int64_t tiles, int64_t samples) {
  // Blocks of one space: two waves of two a multiprocessor (generic), one of three (mma), on 132 of them.
  const int64_t blocks = path == MomentsPath::mma ? 396 : 528, least = path == MomentsPath::mma ? 1024 : 2048;
  const int64_t wanted = (samples + least - 1) / least, most = blocks / tiles < 1 ? 1 : blocks / tiles;
  return int(wanted < 1 ? 1 : wanted < most ? wanted : most);
}
ZF_HD constexpr int64_t moments_partial(MomentsPath path) {
  return kMomentsTile + kMomentsTile * kMomentsTile / (path == MomentsPath::mma ? 2 : 1);
}
constexpr int kMomentsReduceWidth = 32, kMomentsReduce = (kMomentsTile * kMomentsTile + kMomentsTile) / 32;

cudaError_t moments(DType dtype, MomentsPath path, const MomentsJob& job, cudaStream_t stream);
cudaError_t moments_packed(DType dtype, const PackedJob& job, cudaStream_t stream);

// --- correlate
// ------------------------------------------------------------------------------------------------------
constexpr int kCorrelateSpaces = 48, kCorrelateTile = 64, kCorrelateThreads = 256;

struct CorrelateSpace {
  const double* comoment;  // [n, n]
  const double* total;     // [n]
  const double* shift;     // [n]
  void* out;               // [n, n]
  long long* status;       // [kCorrelateFields]
  double share;            // 1 / samples
  int n;
  int block;     // first of its tiles
  bool aligned;  // 16-byte accesses are allowed
};
struct CorrelateJob {
  CorrelateSpace space[kCorrelateSpaces];
  int spaces, blocks;
  bool pair_dead;
};
struct CorrelateBegin {
  long long* status;  // [spaces, kCorrelateFields]
  long long spaces;
};
cudaError_t correlate_begin(const CorrelateBegin& job, cudaStream_t stream);
cudaError_t correlate(DType dtype, const CorrelateJob& job, cudaStream_t stream);

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
  bool aligned;  // 16-byte accesses are allowed
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
constexpr int kSparseThreads = 64, kStagedThreads = 64;
#else
constexpr int kSparseThreads = 256, kStagedThreads = 512;
#endif
// A block that stages the input copies columns x batch numbers; below one weight in so many it would copy more of them
// than it multiplies.
constexpr long long kStagedSparsest = 64;

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
// The staged path: 1 to kSparseFew samples, narrow columns in their own place, values and columns on 16 bytes, not
// float64.  `sparse_staged_samples`: how many samples it takes at a time, 0 where shared memory holds not even one.
int sparse_staged_samples(DType dtype, long long columns, long long batch);
cudaError_t sparse_linear_staged(DType dtype, const SparseJob& job, cudaStream_t stream);
cudaError_t sparse_linear_weight(DType dtype, const SparseJob& job, cudaStream_t stream);

// --- zip_match
// --------------------------------------------------------------------------------------------------------
#ifdef ZF_EMU
constexpr int kMatchThreads = 64;
constexpr int kMatchSpaces = 32;  // small: tests are to see several launches
#else
constexpr int kMatchThreads = 512;
constexpr int kMatchSpaces = 256;
#endif

struct MatchSpace {
  const void* sim;  // [n, n]
  int64_t* group;   // [n]
  int64_t* pair;    // [n - keep, 2]
  void* value;      // [n - keep]
  int64_t* status;  // [kStatusFields]
  int64_t budget;
  int n, keep;
  // The space's blocks; one block may have several spaces, which it takes in turn.
  int block, blocks, next;  // next: the block's next space, -1: none
  bool head;                // the first space of its blocks
  int64_t scratch;          // bytes from MatchJob::scratch
};
struct MatchJob {
  MatchSpace space[kMatchSpaces];
  void* scratch;
  double alpha;
  int spaces, models, blocks;
  bool compat, sequential;
};
cudaError_t zip_match_resident(DType dtype, int& blocks);  // how many the device holds at once
int64_t zip_match_bytes(DType dtype, int64_t n, int64_t blocks);
cudaError_t zip_match(DType dtype, const MatchJob& job, cudaStream_t stream);

}  // namespace zipfast::cuda
