// SPDX-License-Identifier: Apache-2.0
// threshold on a GPU: the exact k of smallest magnitude in each group of tensors, as packed masks (Frankle & Carbin
// 2019, section 1).
//
// Three launches for all groups at once.  `begin` draws a sample by position and brackets the rank.  `collect` reads
// every weight once: it counts what lies above the bracket and writes its bits, and keeps aside the few keys inside it
// with their places, in order, one list a warp.  `finish`, all blocks resident, counts digits of 11 bits of those until
// the threshold is known, counts the ties of each list, so that exactly the first ones go, and sets the bits of those
// that stay.  A list that overflows is read again from the weights; where the bracket misses, so is the whole group:
// nothing but time depends on the sample.  Nothing returns to the host; all sums are integers, so that no order of
// atomics shows.  Bandwidth-bound: one read, and what lies inside the bracket some times over.
#include "cuda/threshold.cuh"

namespace zipfast::cuda {

namespace {

// --- collect

template <class scalar_t>
__device__ inline void collect_span(const ThresholdJob& job, const ThresholdTensor& t, long long low_, long long high_,
                                    long long begin, long long end, long long span, ThresholdTotal& total) {
  using M = rule::Magnitude<scalar_t>;
  using key_t = typename M::key_t;
  using rest_t = std::conditional_t<sizeof(key_t) == 8, uint64_t, uint32_t>;
  constexpr int kFlight = sizeof(key_t) == 8 ? 1 : sizeof(key_t) == 4 ? 2 : 4;
  const key_t low = key_t(low_), high = key_t(high_);
  rest_t* list = reinterpret_cast<rest_t*>(job.key + span * kList * job.width);
  uint16_t* place = job.place + span * kList;
  uint8_t* kept = in_global(reinterpret_cast<uint8_t*>(t.kept));
  unsigned count = 0, above_count = 0, alive_count = 0;
  bool nan = false;
  each_eight<scalar_t, kFlight>(t, begin, end, [&](long long at, unsigned alive, const key_t* key) {
    unsigned above = 0, inside = 0;
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e) {
      above |= unsigned(key[e] >= high) << e;
      inside |= unsigned(key[e] >= low) << e;
      nan |= key[e] == M::kNan;
    }
    above &= alive, inside &= alive & ~above;
    if (at < end) kept[at / kMaskByte] = uint8_t(above);
    above_count += unsigned(__popc(above)), alive_count += unsigned(__popc(alive));
    const unsigned any = __ballot_sync(kFullWarp, inside != 0);
    if (!any) return;
    const unsigned own = unsigned(__popc(inside));
    Before before{unsigned(__popc(any & earlier_lanes())), unsigned(__popc(any))};
    if (__any_sync(kFullWarp, own > 1)) before = warp_before(own);
    if (count + before.total <= kList)
      for (unsigned to = count + before.own; inside; inside &= inside - 1, ++to) {
        const long long from = at + __ffs(int(inside)) - 1;  // read again: registers have no index
        list[to] = rest_t(key_at<scalar_t>(t, from) - low), place[to] = uint16_t(from - begin);
      }
    count += before.total;
  });
  if (__any_sync(kFullWarp, nan))  // perhaps a dead one
    for (long long from = begin; from < end; from += 32) {
      const long long at = from + lane_id();
      const unsigned hit = __ballot_sync(kFullWarp, at < end && alive_at(t, at) && key_at<scalar_t>(t, at) == M::kNan);
      if (!hit) continue;
      if (lane_id() == 0) atomicMin(job.status + t.index, from + __ffs(int(hit)) - 1);
      break;
    }
  total.inside = count;
  total.above = warp_total(above_count), total.alive = warp_total(alive_count);
}

// What was found, turned into what is left to look for.
__device__ inline void settle(const ThresholdJob& job, int g) {
  ThresholdGroup& group = job.state[g];
  if (group.pieces == 0) return;
  // By atomics, as this block may hold an old copy.
  const auto alive = (long long)atomicAdd(&job.total[g].alive, 0ull);
  const auto above = (long long)atomicAdd(&job.total[g].above, 0ull);
  auto inside = (long long)atomicAdd(&job.total[g].inside, 0ull);
  const long long k = group.drop < alive ? group.drop : alive, below = alive - above - inside;
  group.rank = k - below;
  group.missed = group.rank < 0 || group.rank > inside;
  if (group.missed) group.low = 0, group.high = keys_of(group.dtype).end, group.rank = k, inside = alive;
  group.bits = 0;
  while ((group.high - group.low - 1) >> group.bits > 0) ++group.bits;
  group.prefix = group.rank ? 0 : -1;
  group.equal = group.rank ? inside : 0;
  if (group.rank) atomicMax(job.passes, rule::threshold_passes(group.bits));
  job.status[job.inputs + g] = alive;
}

// --- finish

// Calls f(group, its number, first piece, last + 1) for what this block has of each group: pieces side by side.
__device__ inline int pieces_each(const ThresholdJob& job) {
  return (job.pieces + int(gridDim.x) - 1) / int(gridDim.x);
}
template <class F>
__device__ inline void each_share(const ThresholdJob& job, F&& f) {
  const int each = pieces_each(job), begin = int(blockIdx.x) * each;
  const int end = begin + each < job.pieces ? begin + each : job.pieces;
  for (int at = begin; at < end;) {
    const int g = job.table[job.row[at]].group;
    const ThresholdGroup& group = job.state[g];
    const int until = group.piece + group.pieces < end ? group.piece + group.pieces : end;
    f(group, g, at, until);
    at = until;
  }
}

struct Place {
  const ThresholdTensor* tensor;
  long long begin, end;  // elements; none: begin >= end
};
__device__ inline Place place_of(const ThresholdJob& job, int span) {
  const int piece = span / kThresholdSpans;
  const ThresholdTensor* t = job.table + job.row[piece];
  const long long begin = (long long)(piece - t->first) * kThresholdPiece + span % kThresholdSpans * kSpan;
  return {t, begin, begin + kSpan < t->size ? begin + kSpan : t->size};
}

// Each warp of the block calls, for its ones of spans [first, last): sparse(span, candidates, kList / 32 of them in
// each lane), or dense(span) where the weights must be read again.
template <class rest_t, class Sparse, class Dense>
__device__ inline void each_span(const ThresholdJob& job, const ThresholdGroup& group, int first, int last,
                                 Sparse&& sparse, Dense&& dense) {
  constexpr int kAhead = sizeof(rest_t) == 8 ? 2 : 4;  // spans loaded before the first is used
  const bool missed = group.missed;
  for (int base = first + int(threadIdx.x / 32); base < last; base += 32 * kFinishWarps) {
    const int mine = base + int(lane_id()) * kFinishWarps;
    const unsigned own = mine < last ? job.count[mine] : 0;
    for (int i = 0; i < 32 && base + i * kFinishWarps < last; i += kAhead) {
      unsigned n[kAhead];
      rest_t rest[kAhead][kList / 32];
      ZF_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        n[a] = __shfl_sync(kFullWarp, own, i + a);
        if (missed) n[a] = kAll;
        const long long at = (long long)(base + (i + a) * kFinishWarps) * kList;
        const rest_t* list = reinterpret_cast<const rest_t*>(job.key + at * job.width);
        ZF_UNROLL
        for (int c = 0; c < kList / 32; ++c) {
          const unsigned e = c * 32 + lane_id();
          rest[a][c] = n[a] <= kList && e < n[a] ? list[e] : rest_t(0);
        }
      }
      ZF_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int span = base + (i + a) * kFinishWarps;
        if (span >= last) break;
        if (n[a] > kList)
          dense(span);
        else
          sparse(span, n[a], rest[a]);
      }
    }
  }
}
// Calls f with a null pointer of the type of a group's candidates.
template <class F>
__device__ inline void each_rest(uint8_t dtype, F&& f) {
  if (DType(dtype) == DType::f64)
    f(static_cast<uint64_t*>(nullptr));
  else
    f(static_cast<uint32_t*>(nullptr));
}

struct Digit {
  int shift, top;
  long long prefix;
};
template <class rest_t>
__device__ inline void count_digit(const Digit& d, bool has, rest_t rest, unsigned* bin) {
  if (has && rest >> d.top == rest_t(d.prefix))
    atomicAdd(bin + (rest >> d.shift & ((rest_t(1) << (d.top - d.shift)) - 1)), 1u);
}
// Keys above the bracket may be counted with those inside: the digit is looked for from below.  Those below it are
// negative here, and begin with no prefix.
template <class scalar_t>
__device__ inline void count_span(const Place& p, const ThresholdGroup& group, const Digit& d, unsigned* bin) {
  const long long low = group.low;
  each_eight<scalar_t, 1>(*p.tensor, p.begin, p.end, [&](long long, unsigned alive, const auto* key) {
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e) count_digit(d, alive >> e & 1, uint64_t(key[e] - low), bin);
  });
}

template <class scalar_t>
__device__ inline unsigned span_ties(const Place& p, long long threshold) {
  unsigned ties = 0;
  each_eight<scalar_t, 1>(*p.tensor, p.begin, p.end, [&](long long, unsigned alive, const auto* key) {
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e) ties += (alive >> e & 1) && key[e] == threshold;
  });
  return warp_total(ties);
}

// `skip`: how many of those that equal the threshold go.
template <class scalar_t>
__device__ inline void write_span(const Place& p, long long threshold, unsigned skip) {
  uint8_t* kept = in_global(reinterpret_cast<uint8_t*>(p.tensor->kept));
  each_eight<scalar_t, 1>(*p.tensor, p.begin, p.end, [&](long long at, unsigned alive, const auto* key) {
    unsigned above = 0, equal = 0;
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e)
      above |= unsigned(key[e] > threshold) << e, equal |= unsigned(key[e] == threshold) << e;
    equal &= alive;
    const Before before = warp_before(unsigned(__popc(equal)));
    for (unsigned go = skip > before.own ? skip - before.own : 0; go && equal; --go) equal &= equal - 1;
    skip = skip > before.total ? skip - before.total : 0;
    if (at < p.end) kept[at / kMaskByte] = uint8_t((above & alive) | equal);
  });
}

// The bits of all candidates are 0 before.  `word` holds those of a span.
template <class rest_t>
__device__ inline void patch_span(const ThresholdJob& job, int span, unsigned n, const rest_t* rest, long long prefix,
                                  unsigned skip, unsigned* word) {
  if (n == 0) return;
  const Place p = place_of(job, span);
  uint32_t* kept = in_global(p.tensor->kept) + p.begin / 32;
  const int words = int((p.end - p.begin + 31) / 32);
  unsigned place[kList / 32];
  ZF_UNROLL
  for (int c = 0; c < kList / 32; ++c) {
    const unsigned e = c * 32 + lane_id();
    place[c] = e < n ? job.place[(long long)span * kList + e] : 0;
  }
  for (int w = lane_id(); w < words; w += 32) word[w] = kept[w];
  __syncwarp();
  ZF_UNROLL
  for (int c = 0; c < kList / 32; ++c) {
    const bool has = c * 32 + lane_id() < n, tie = has && (long long)rest[c] == prefix;
    const unsigned ties = __ballot_sync(kFullWarp, tie), total = unsigned(__popc(ties));
    const bool late = tie && unsigned(__popc(ties & earlier_lanes())) >= skip;
    if (late || (has && (long long)rest[c] > prefix)) atomicAdd(word + place[c] / 32, 1u << place[c] % 32);
    skip = skip > total ? skip - total : 0;
  }
  __syncwarp();  // each lane takes the words that it will fill next time
  for (int w = lane_id(); w < words; w += 32) kept[w] = word[w];
}

struct FinishScratch {
  unsigned bin[kThresholdCopies][kBins];
  unsigned word[kFinishWarps][kSpan / 32];
  unsigned skip[kThresholdFinish];
  long long scan[kFinishWarps];
  unsigned ties;
};

__device__ inline void finish_count(const ThresholdJob& job, int pass, FinishScratch& s) {
  each_share(job, [&](const ThresholdGroup& group, int g, int from, int to) {
    if (group.rank == 0 || pass >= rule::threshold_passes(group.bits)) return;
    const Digit d{rule::threshold_shift(group.bits, pass),
                  pass ? rule::threshold_shift(group.bits, pass - 1) : group.bits, group.prefix};
    for (int b = threadIdx.x; b < kThresholdCopies * kBins; b += kThresholdFinish) s.bin[b / kBins][b % kBins] = 0;
    __syncthreads();
    // Equal keys are many where types are short: several copies, so that fewer warps wait for one bin.
    unsigned* own = s.bin[threadIdx.x / 32 % kThresholdCopies];
    each_rest(group.dtype, [&](auto* type) {
      using rest_t = Pointee<decltype(type)>;
      each_span<rest_t>(
          job, group, from * kThresholdSpans, to * kThresholdSpans,
          [&](int, unsigned n, const rest_t* rest) {
            ZF_UNROLL
            for (int c = 0; c < kList / 32; ++c) count_digit(d, c * 32 + lane_id() < n, rest[c], own);
          },
          [&](int span) {
            const Place p = place_of(job, span);
            each_dtype_of<rest_t>(group.dtype,
                                  [&](auto* scalar) { count_span<Pointee<decltype(scalar)>>(p, group, d, own); });
          });
    });
    __syncthreads();
    unsigned long long* out = job.bin + (long long)g * kBins;
    // A thread reads the bins that it will zero for the next group.
    for (int b = threadIdx.x; b < kBins; b += kThresholdFinish) {
      unsigned sum = 0;
      for (int c = 0; c < kThresholdCopies; ++c) sum += s.bin[c][b];
      if (sum) atomicAdd(out + b, (unsigned long long)sum);
    }
  });
}

// The digit of each group, one block a group; its bins are zero again afterwards.
__device__ inline void finish_pick(const ThresholdJob& job, int pass, FinishScratch& s) {
  constexpr int kOwn = kBins / kThresholdFinish;
  for (int g = blockIdx.x; g < job.groups; g += gridDim.x) {
    ThresholdGroup& group = job.state[g];
    if (group.pieces == 0 || group.rank == 0 || pass >= rule::threshold_passes(group.bits)) continue;
    const int shift = rule::threshold_shift(group.bits, pass);
    const int top = pass ? rule::threshold_shift(group.bits, pass - 1) : group.bits;
    unsigned long long* bin = job.bin + (long long)g * kBins + threadIdx.x * kOwn;
    const long long prefix = group.prefix, rank = group.rank;
    long long own = 0, total;
    for (int b = 0; b < kOwn; ++b) own += (long long)bin[b];
    long long before = block_before<kThresholdFinish>(own, s.scan, &total);  // its barriers: all have read the state
    for (int b = 0; b < kOwn; ++b) {
      const auto here = (long long)bin[b];
      bin[b] = 0;
      if (rank > before && rank <= before + here) {  // in one bin of one thread
        group.prefix = prefix << (top - shift) | (threadIdx.x * kOwn + b);
        group.rank = rank - before;
        group.equal = here;
      }
      before += here;
    }
  }
}

__device__ inline void finish_ties(const ThresholdJob& job, FinishScratch& s) {
  each_share(job, [&](const ThresholdGroup& group, int, int from, int to) {
    if (group.rank == group.equal) return;  // all of them go
    if (threadIdx.x == 0) s.ties = 0;
    __syncthreads();
    unsigned sum = 0;
    auto note = [&](int span, unsigned ties) {
      if (lane_id() == 0) job.ties[span] = ties;
      sum += ties;
    };
    each_rest(group.dtype, [&](auto* type) {
      using rest_t = Pointee<decltype(type)>;
      each_span<rest_t>(
          job, group, from * kThresholdSpans, to * kThresholdSpans,
          [&](int span, unsigned n, const rest_t* rest) {
            unsigned ties = 0;
            ZF_UNROLL
            for (int c = 0; c < kList / 32; ++c) {
              const bool tie = c * 32 + lane_id() < n && (long long)rest[c] == group.prefix;
              ties += unsigned(__popc(__ballot_sync(kFullWarp, tie)));
            }
            note(span, ties);
          },
          [&](int span) {
            const Place p = place_of(job, span);
            each_dtype_of<rest_t>(group.dtype, [&](auto* scalar) {
              note(span, span_ties<Pointee<decltype(scalar)>>(p, group.low + group.prefix));
            });
          });
    });
    if (lane_id() == 0) atomicAdd(&s.ties, sum);
    __syncthreads();
    if (threadIdx.x == 0) job.last[blockIdx.x] = s.ties;
  });
}

__device__ inline void finish_write(const ThresholdJob& job, FinishScratch& s) {
  each_share(job, [&](const ThresholdGroup& group, int, int from, int to) {
    const bool partly = group.rank < group.equal;
    const int first = from * kThresholdSpans, last = to * kThresholdSpans;
    unsigned* word = s.word[threadIdx.x / 32];
    long long left = group.rank;  // of the equal ones that go
    if (partly) {                 // A block that the group goes on from has it as its last one.
      long long own = 0, total;
      for (int b = group.piece / pieces_each(job) + int(threadIdx.x); b < int(blockIdx.x); b += kThresholdFinish)
        own += (long long)job.last[b];
      block_before<kThresholdFinish>(own, s.scan, &total);
      left -= total;
    }
    for (int begin = first; begin < last; begin += kThresholdFinish) {
      const int end = begin + kThresholdFinish < last ? begin + kThresholdFinish : last,
                mine = begin + int(threadIdx.x);
      if (partly) {
        const long long ties = mine < end ? job.ties[mine] : 0;
        long long total;
        // Its barriers: nobody needs the old skips.
        const long long go = left - block_before<kThresholdFinish>(ties, s.scan, &total);
        s.skip[threadIdx.x] = unsigned(go < 0 ? 0 : go < kSpan ? go : kSpan);
        left -= total;
        __syncthreads();
      }
      each_rest(group.dtype, [&](auto* type) {
        using rest_t = Pointee<decltype(type)>;
        each_span<rest_t>(
            job, group, begin, end,
            [&](int span, unsigned n, const rest_t* rest) {
              patch_span(job, span, n, rest, group.prefix, partly ? s.skip[span - begin] : kAll, word);
            },
            [&](int span) {
              const Place p = place_of(job, span);
              const unsigned skip = partly ? s.skip[span - begin] : kAll;
              each_dtype_of<rest_t>(group.dtype, [&](auto* scalar) {
                write_span<Pointee<decltype(scalar)>>(p, group.low + group.prefix, skip);
              });
            });
      });
    }
  });
}

}  // namespace

__global__ void __launch_bounds__(kThresholdWide) threshold_begin_kernel(const __grid_constant__ ThresholdBegin job) {
  const ThresholdJob& all = job.job;
  const bool whole = job.rows == all.rows && job.groups == all.groups;
  const int thread = int(blockIdx.x * kThresholdWide + threadIdx.x), threads = int(gridDim.x) * kThresholdWide;
  if (job.first == 0 && job.row == 0) {
    for (int t = thread; t < all.inputs; t += threads) all.status[t] = 0x7fffffffffffffffll;
    if (thread == 0) *all.ticket = 0, *all.passes = 0;
  }
  const int g = int(blockIdx.x);
  if (g < job.groups && threadIdx.x == 0) {
    ThresholdGroup& group = all.state[job.first + g];
    group.drop = job.group[g].drop, group.tensor = job.group[g].tensor, group.tensors = job.group[g].tensors;
  }
  if (!whole) {
    for (int r = thread; r < job.rows; r += threads) all.table[job.row + r] = job.tensor[r];
    return;
  }
  const int begin = job.group[g].tensor, end = begin + job.group[g].tensors;
  for (int r = begin + int(threadIdx.x); r < end; r += kThresholdWide) all.table[r] = job.tensor[r];
  __syncthreads();
  bracket_group(all, g);
}

__global__ void __launch_bounds__(kThresholdWide) threshold_bracket_kernel(const __grid_constant__ ThresholdJob job) {
  bracket_group(job, blockIdx.x);
}

__global__ void __launch_bounds__(kThresholdThreads, 4)
    threshold_collect_kernel(const __grid_constant__ ThresholdJob job) {
  __shared__ unsigned alive, above, inside;
  __shared__ bool last;
  const int piece = int(blockIdx.x), row = row_at(job, piece), warp = int(threadIdx.x / 32);
  const ThresholdTensor t = job.table[row];
  const long long low = job.state[t.group].low, high = job.state[t.group].high;
  const long long start = (long long)(piece - t.first) * kThresholdPiece, begin = start + warp * kSpan;
  const long long end = begin + kSpan < t.size ? begin + kSpan : t.size,
                  span = (long long)piece * kThresholdSpans + warp;
  if (threadIdx.x == 0) job.row[piece] = row, alive = above = inside = 0;
  __syncthreads();
  ThresholdTotal total{};
  if (begin < end)
    each_dtype(t.dtype, [&](auto* scalar) {
      collect_span<Pointee<decltype(scalar)>>(job, t, low, high, begin, end, span, total);
    });
  if (lane_id() == 0) {
    job.count[span] = unsigned(total.inside);
    atomicAdd(&alive, unsigned(total.alive)), atomicAdd(&above, unsigned(total.above));
    atomicAdd(&inside, unsigned(total.inside));
  }
  if (start + kThresholdPiece >= t.size)  // what follows the last element is 0
    for (long long at = (t.size + 7) / 8 + threadIdx.x; at < (t.size + 511) / 512 * 64; at += kThresholdThreads)
      in_global(reinterpret_cast<uint8_t*>(t.kept))[at] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    ThresholdTotal& all = job.total[t.group];
    atomicAdd(&all.alive, (unsigned long long)alive), atomicAdd(&all.above, (unsigned long long)above);
    atomicAdd(&all.inside, (unsigned long long)inside);
    __threadfence();
    last = atomicAdd(job.ticket, 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int g = threadIdx.x; g < job.groups; g += kThresholdThreads) settle(job, g);
}

__global__ void __launch_bounds__(kThresholdFinish, 1)
    threshold_finish_kernel(const __grid_constant__ ThresholdJob job) {
  __shared__ FinishScratch scratch;
  const auto grid = cooperative_groups::this_grid();
  const int passes = *job.passes;
  for (int pass = 0; pass < passes; ++pass) {
    finish_count(job, pass, scratch);
    grid.sync();
    finish_pick(job, pass, scratch);
    grid.sync();
  }
  finish_ties(job, scratch);
  grid.sync();
  finish_write(job, scratch);
}

cudaError_t threshold_begin(const ThresholdBegin& job, cudaStream_t stream) {
  const unsigned blocks = job.groups ? unsigned(job.groups) : 1u;
  ZF_LAUNCH((threshold_begin_kernel), blocks, unsigned(kThresholdWide), 0, stream, job);
  return cudaGetLastError();
}

cudaError_t threshold_bracket(const ThresholdJob& job, cudaStream_t stream) {
  ZF_LAUNCH((threshold_bracket_kernel), unsigned(job.groups), unsigned(kThresholdWide), 0, stream, job);
  return cudaGetLastError();
}

cudaError_t threshold_collect(const ThresholdJob& job, cudaStream_t stream) {
  ZF_LAUNCH((threshold_collect_kernel), unsigned(job.pieces), unsigned(kThresholdThreads), 0, stream, job);
  return cudaGetLastError();
}

cudaError_t threshold_finish(const ThresholdJob& job, cudaStream_t stream) {
#ifdef ZF_EMU
  const int resident = 3;
#else
  int device = 0, resident = 0;  // one block a multiprocessor
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&resident, cudaDevAttrMultiProcessorCount, device);
  if (e != cudaSuccess) return e;
  if (resident > kThresholdBlocks) resident = kThresholdBlocks;
#endif
  const unsigned blocks = unsigned(resident < job.pieces ? resident : job.pieces);
  ZF_LAUNCH_COOP((threshold_finish_kernel), blocks, unsigned(kThresholdFinish), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
