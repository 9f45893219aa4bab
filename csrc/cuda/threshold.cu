// SPDX-License-Identifier: Apache-2.0
// threshold on a GPU: the exact k of smallest magnitude in each group of tensors, as packed masks (Frankle & Carbin
// 2019, section 1).
//
// Digits of 11 bits are counted from the highest, for all groups at once (2 passes for half types, 3 for float32, 6 for
// float64): blocks count their piece in shared memory and add to the group's bins; one block a group then picks the
// digit.  What equals the threshold is counted piece by piece and summed up in order, so that exactly the first ones
// go; the last pass writes one word a warp, by ballots.  Nothing returns to the host; all sums are integers, so that
// no order of atomics shows.  Bandwidth-bound: one read for each digit, one to write, one more where only some of the
// equal ones go.
#include "cuda/scope.cuh"
#include "cuda/launch.h"

namespace zipfast::cuda {

namespace {

constexpr int kBins = rule::kThresholdBins, kWarps = kThresholdThreads / 32;
constexpr long long kSpan = kThresholdPiece / kWarps;  // elements of a warp, side by side
static_assert(kSpan % 32 == 0, "a word belongs to one warp");

struct Place {
  ThresholdTensor tensor;
  long long begin, end;  // elements
};

__device__ inline Place threshold_place(const ThresholdJob& job, long long block) {
  int low = 0, high = job.tensors - 1;  // the last tensor whose first block is at or before this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (job.tensor[middle].first <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const ThresholdTensor& tensor = job.tensor[low];
  const long long begin = (block - tensor.first) * kThresholdPiece, end = begin + kThresholdPiece;
  return {tensor, begin, end < tensor.size ? end : tensor.size};
}

__device__ inline bool alive_at(const ThresholdTensor& t, long long at) {
  return !t.mask || (t.mask[at >> 3] >> (at & 7) & 1);
}

template <class scalar_t>
__device__ inline long long key_at(const ThresholdTensor& t, long long at) {
  using key_t = typename rule::Magnitude<scalar_t>::key_t;
  return rule::magnitude_key<scalar_t>(static_cast<const key_t*>(t.data)[at]);
}

template <class scalar_t>
__device__ inline void count_piece(const ThresholdJob& job, const Place& place, int pass, long long prefix,
                                   unsigned* bin) {
  using M = rule::Magnitude<scalar_t>;
  const int shift = rule::threshold_shift(M::kBits, pass);
  const int top = pass ? rule::threshold_shift(M::kBits, pass - 1) : M::kBits;
  const long long digit = (1ll << (top - shift)) - 1;
  for (long long at = place.begin + threadIdx.x; at < place.end; at += kThresholdThreads) {
    if (!alive_at(place.tensor, at)) continue;
    const long long key = key_at<scalar_t>(place.tensor, at);
    if (pass == 0 && key == M::kNan) atomicMin(job.status + place.tensor.index, at);
    if (key >> top == prefix) atomicAdd(bin + (key >> shift & digit), 1u);
  }
}

// Survivors of 32 elements from `at` on, `at` a multiple of 32, that equal the threshold, and those above it: valid in
// every lane.  All lanes call it.
struct Words {
  unsigned above, equal;
};
template <class scalar_t>
__device__ inline Words words_at(const Place& place, long long at, long long threshold) {
  at += threadIdx.x % 32;
  const bool alive = at < place.end && alive_at(place.tensor, at);
  const long long key = alive ? key_at<scalar_t>(place.tensor, at) : -1;
  return {__ballot_sync(kFullWarp, alive && key > threshold), __ballot_sync(kFullWarp, alive && key == threshold)};
}

// Those of a warp's span that equal the threshold; valid in every lane.
template <class scalar_t>
__device__ inline long long span_ties(const Place& place, long long threshold) {
  const long long begin = place.begin + threadIdx.x / 32 * kSpan;
  const long long end = begin + kSpan < place.end ? begin + kSpan : place.end;
  long long ties = 0;
  for (long long at = begin; at < end; at += 32) ties += __popc(words_at<scalar_t>(place, at, threshold).equal);
  return ties;
}

// `skip`: how many of the equal ones of this warp's span go.
template <class scalar_t>
__device__ inline void write_span(const Place& place, long long threshold, long long skip) {
  const long long begin = place.begin + threadIdx.x / 32 * kSpan;
  const long long end = begin + kSpan < place.end ? begin + kSpan : place.end;
  const unsigned lane = threadIdx.x % 32;
  for (long long at = begin; at < end; at += 32) {
    const Words words = words_at<scalar_t>(place, at, threshold);
    unsigned stays = words.equal;
    if (skip > 0 && stays) {
      const int equal = __popc(stays), before = __popc(stays & ((1u << lane) - 1));
      stays = __ballot_sync(kFullWarp, (stays >> lane & 1) && before >= skip);
      skip -= equal < skip ? equal : skip;
    }
    if (lane == 0) place.tensor.kept[at / 32] = words.above | stays;
  }
}

// The sum of `own` over the threads before this one; `total` gets all.  `scratch` holds a number for each thread;
// contains two barriers.
__device__ inline long long block_before(long long own, long long* scratch, long long* total) {
  scratch[threadIdx.x] = own;
  __syncthreads();
  long long before = 0, all = 0;
  for (unsigned t = 0; t < kThresholdThreads; ++t) {
    if (t == threadIdx.x) before = all;
    all += scratch[t];
  }
  __syncthreads();  // the scratch may be written again
  *total = all;
  return before;
}

// `skip`: how many of the equal ones of this piece go; `partly`: they are told apart.
template <class scalar_t>
__device__ inline void write_piece(const Place& place, long long threshold, long long skip, bool partly,
                                   long long* scratch) {
  if (partly) {
    const long long ties = span_ties<scalar_t>(place, threshold);
    long long total;
    const long long before = block_before(threadIdx.x % 32 ? 0 : ties, scratch, &total);
    const long long earlier = __shfl_sync(kFullWarp, before, 0);
    skip = earlier < skip ? skip - earlier : 0;
  }
  write_span<scalar_t>(place, threshold, skip);
}

#define ZF_EACH_DTYPE(dtype, call) \
  switch (dtype) {                 \
    case DType::f64:               \
      call(double);                \
      break;                       \
    case DType::f16:               \
      call(Half);                  \
      break;                       \
    case DType::bf16:              \
      call(BFloat16);              \
      break;                       \
    default:                       \
      call(float);                 \
      break;                       \
  }

}  // namespace

__global__ void threshold_begin_kernel(const __grid_constant__ ThresholdBegin job) {
  const long long thread = blockIdx.x * (long long)kThresholdThreads + threadIdx.x;
  const long long threads = gridDim.x * (long long)kThresholdThreads;
  for (long long e = thread; e < (long long)job.groups * kBins; e += threads)
    job.bin[(long long)job.first * kBins + e] = 0;
  for (long long g = thread; g < job.groups; g += threads) job.state[job.first + g] = job.group[g];
  if (job.first == 0)
    for (long long t = thread; t < job.tensors; t += threads) job.status[t] = 0x7fffffffffffffffll;
}

__global__ void __launch_bounds__(kThresholdThreads)
    threshold_count_kernel(const __grid_constant__ ThresholdJob job, int pass) {
  __shared__ unsigned bin[kThresholdCopies][kBins];
  const Place place = threshold_place(job, blockIdx.x);
  const ThresholdGroup& group = job.state[place.tensor.group];
  if (pass >= rule::threshold_passes(group.bits) || group.prefix < 0) return;
  for (int b = threadIdx.x; b < kThresholdCopies * kBins; b += kThresholdThreads) bin[0][b] = 0;
  __syncthreads();
  // Weights share few exponents: several copies, so that fewer threads wait for one bin.
  unsigned* own = bin[threadIdx.x / 32 % kThresholdCopies];
#define ZF_CALL(scalar_t) count_piece<scalar_t>(job, place, pass, group.prefix, own)
  ZF_EACH_DTYPE(place.tensor.dtype, ZF_CALL)
#undef ZF_CALL
  __syncthreads();
  unsigned long long* out = job.bin + (long long)place.tensor.group * kBins;
  for (int b = threadIdx.x; b < kBins; b += kThresholdThreads) {
    unsigned sum = 0;
    for (int c = 0; c < kThresholdCopies; ++c) sum += bin[c][b];
    if (sum) atomicAdd(out + b, (unsigned long long)sum);
  }
}

// One block a group; its bins are zero again afterwards.
__global__ void __launch_bounds__(kThresholdThreads)
    threshold_pick_kernel(const __grid_constant__ ThresholdGroups job, int pass) {
  __shared__ long long scratch[kThresholdThreads];
  constexpr int kOwn = kBins / kThresholdThreads;
  ThresholdGroup& group = job.state[blockIdx.x];
  unsigned long long* bin = job.bin + (long long)blockIdx.x * kBins + threadIdx.x * kOwn;
  if (pass >= rule::threshold_passes(group.bits) || group.prefix < 0) return;
  const int shift = rule::threshold_shift(group.bits, pass);
  const int top = pass ? rule::threshold_shift(group.bits, pass - 1) : group.bits;
  const long long prefix = group.prefix;
  long long rank = group.rank, own = 0, total;
  for (int b = 0; b < kOwn; ++b) own += bin[b];
  long long before = block_before(own, scratch, &total);  // its barriers: all have read the state
  if (pass == 0) {
    rank = group.drop < total ? group.drop : total;
    if (threadIdx.x == 0) {
      job.survivors[blockIdx.x] = group.survivors = total;
      if (rank == 0) group.prefix = -1, group.rank = 0, group.equal = 0;
    }
  }
  for (int b = 0; b < kOwn; ++b) {
    const long long here = bin[b];
    bin[b] = 0;
    if (rank > before && rank <= before + here) {  // in one bin of one thread, unless rank is 0
      group.prefix = prefix << (top - shift) | (threadIdx.x * kOwn + b);
      group.rank = rank - before;
      group.equal = here;
    }
    before += here;
  }
}

__global__ void __launch_bounds__(kThresholdThreads) threshold_ties_kernel(const __grid_constant__ ThresholdJob job) {
  __shared__ long long scratch[kThresholdThreads];
  const Place place = threshold_place(job, blockIdx.x);
  const ThresholdGroup& group = job.state[place.tensor.group];
  long long ties = 0;
  if (group.rank < group.equal) {  // else all of them go
#define ZF_CALL(scalar_t) ties = span_ties<scalar_t>(place, group.prefix)
    ZF_EACH_DTYPE(place.tensor.dtype, ZF_CALL)
#undef ZF_CALL
    block_before(threadIdx.x % 32 ? 0 : ties, scratch, &ties);
  }
  if (threadIdx.x == 0) job.part[job.column + blockIdx.x] = ties;
}

// One block a group: the ties of each piece become those before it, in order.
__global__ void __launch_bounds__(kThresholdThreads)
    threshold_share_kernel(const __grid_constant__ ThresholdGroups job) {
  __shared__ long long scratch[kThresholdThreads];
  const ThresholdGroup& group = job.state[blockIdx.x];
  const long long each = (group.blocks + kThresholdThreads - 1) / kThresholdThreads;
  long long begin = threadIdx.x * each, end = begin + each, own = 0, total;
  if (begin > group.blocks) begin = group.blocks;
  if (end > group.blocks) end = group.blocks;
  long long* part = job.part + group.first;
  for (long long b = begin; b < end; ++b) own += part[b];
  long long before = block_before(own, scratch, &total);
  for (long long b = begin; b < end; ++b) {
    const long long here = part[b];
    part[b] = before;
    before += here;
  }
}

__global__ void __launch_bounds__(kThresholdThreads) threshold_write_kernel(const __grid_constant__ ThresholdJob job) {
  __shared__ long long scratch[kThresholdThreads];
  const Place place = threshold_place(job, blockIdx.x);
  const ThresholdGroup& group = job.state[place.tensor.group];
  const long long index = job.column + blockIdx.x, left = group.rank - job.part[index];
  const bool last = index + 1 == group.first + group.blocks;
  // Does the last of those that go lie in this piece?
  const bool partly = group.rank < group.equal && left > 0 && (last || group.rank < job.part[index + 1]);
  const long long skip = group.rank == group.equal ? group.equal : left < 0 ? 0 : left;
#define ZF_CALL(scalar_t) write_piece<scalar_t>(place, group.prefix, skip, partly, scratch)
  ZF_EACH_DTYPE(place.tensor.dtype, ZF_CALL)
#undef ZF_CALL
  if (place.end == place.tensor.size) {  // what follows the last element is 0
    const long long from = (place.end + 31) / 32, to = (place.end + 511) / 512 * 16;
    for (long long word = from + threadIdx.x; word < to; word += kThresholdThreads) place.tensor.kept[word] = 0;
  }
}

cudaError_t threshold_begin(const ThresholdBegin& job, cudaStream_t stream) {
  const int wanted = (job.groups * kBins + kThresholdThreads - 1) / kThresholdThreads;
  ZF_LAUNCH((threshold_begin_kernel), unsigned(wanted < 256 ? wanted : 256), unsigned(kThresholdThreads), 0, stream,
            job);
  return cudaGetLastError();
}

cudaError_t threshold_count(const ThresholdJob& job, int pass, cudaStream_t stream) {
  ZF_LAUNCH((threshold_count_kernel), unsigned(job.blocks), unsigned(kThresholdThreads), 0, stream, job, pass);
  return cudaGetLastError();
}

cudaError_t threshold_pick(const ThresholdGroups& job, int pass, cudaStream_t stream) {
  ZF_LAUNCH((threshold_pick_kernel), unsigned(job.groups), unsigned(kThresholdThreads), 0, stream, job, pass);
  return cudaGetLastError();
}

cudaError_t threshold_ties(const ThresholdJob& job, cudaStream_t stream) {
  ZF_LAUNCH((threshold_ties_kernel), unsigned(job.blocks), unsigned(kThresholdThreads), 0, stream, job);
  return cudaGetLastError();
}

cudaError_t threshold_share(const ThresholdGroups& job, cudaStream_t stream) {
  ZF_LAUNCH((threshold_share_kernel), unsigned(job.groups), unsigned(kThresholdThreads), 0, stream, job);
  return cudaGetLastError();
}

cudaError_t threshold_write(const ThresholdJob& job, cudaStream_t stream) {
  ZF_LAUNCH((threshold_write_kernel), unsigned(job.blocks), unsigned(kThresholdThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
