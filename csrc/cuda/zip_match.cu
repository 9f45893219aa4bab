// SPDX-License-Identifier: Apache-2.0
// zip_match on a GPU: rounds of reciprocal nearest neighbours, exact to the last tie (Stoica et al. 2024, section 4.3).
//
// Edges are ordered by value (descending), then row, then column.  Why a round may merge every pair that is first in
// both of its rows: while values are positive, alpha <= 1 and forbidden pairs only multiply, (1) no edge ever rises,
// (2) rounding is monotone, so disjoint merges give the same bits in any order, (3) such a pair stays first in both
// rows until it is executed, so the sequential greedy executes it at this very value, and (4) greedy's keys strictly
// fall: the executed merges, sorted by key, are its sequence.  Merges that precede the best open edge are settled.
// Rounds end once `need` are, or those that exhaust a model, or once no positive edge is left.
//
// Budgets forbid pairs from one merge on, so the work goes in phases: run rounds, rank the merges, find the first that
// exhausts a model, keep those up to it, make the matrix anew from the input (zip_match.cuh), forbid, go on (at most M
// + 1 phases).  Values <= 0 break (1): one block finishes them one after the other, from the same state, and does so
// from the start on the path "sequential".
//
// One cooperative launch serves all spaces at once: each has blocks of its own, which meet at barriers of their own,
// two a round; small spaces share a block and take turns.  Decisions that steer the loops are computed by every block
// from the same data, which is not written again before the next barrier. Cost: 5 to 40 rounds on real networks, each
// reading the rows that lost their first edge; memory one copy of the matrices at work.
#include "cuda/zip_match.cuh"

namespace zipfast::cuda {
namespace {

template <class scalar_t>
class Matcher : MatchBoard<scalar_t> {
  using Board = MatchBoard<scalar_t>;
  using Board::alpha_, Board::block_, Board::blocks_, Board::budget, Board::compat_, Board::edge, Board::improve;
  using Board::kChunk, Board::kSize, Board::lane, Board::look, Board::m_, Board::meet, Board::merged;
  using Board::merges_, Board::models_, Board::n_, Board::no_edge, Board::none, Board::own_rows, Board::rescan;
  using Board::row, Board::s_, Board::start, Board::thread, Board::threads, Board::w_, Board::warp;
  using Board::warps;

 public:
  __device__ Matcher(const MatchJob& job, const MatchSpace& space, MatchShared<scalar_t>& shared)
      : Board(job, space, shared) {}

  __device__ void run(bool sequential) {
    if (!compat_ && s_.budget <= 0) exhausted_ = int((1u << models_) - 1);
    if (!start()) {
      meet();
    } else {
      if (sequential || play()) finish(sequential);
      if (done_ == merges_) label();
    }
    if (thread() == 0) {  // there was a barrier since the others read this
      int64_t &nan = s_.status[rule::kNanAt], &asymmetric = s_.status[rule::kAsymmetricAt];
      if (nan != INT64_MAX || asymmetric == INT64_MAX) asymmetric = -1;
      if (nan == INT64_MAX) nan = -1;
    }
  }

 private:
  // All merges in phases of rounds, or as many as edges allow; whether those are left that are no longer positive.
  __device__ bool play() {
    for (bool rebuilt = false; done_ < merges_;) {
      const int need = merges_ - done_;
      const bool watch = watched();
      if (watch)
        for (int k = thread(); k < n_; k += threads()) w_.saved()[k] = w_.models()[k];
      int count = 0;
      const Edge<scalar_t> open = rounds_until_settled(need, watch, rebuilt, &count);
      rebuilt = false;
      if (count) {
        rank(count, watch);
        meet();
        const int most = count < need ? count : need, event = watch ? w_.state()->event : INT_MAX;
        const int prefix = event < most ? event + 1 : most;
        book(count, prefix, watch);
        meet();
        done_ += prefix;
        if (done_ == merges_) break;
        if (thread() == 0) w_.state()->event = INT_MAX;
        if (prefix < count) {
          rebuild();
          rebuilt = true;
        }
        if (event < most) {
          exhaust();
          continue;
        }
      }
      if (open.value != none()) return true;
      if (!lift_or_stop()) return false;
      meet();  // all blocks know the open edge
    }
    return false;
  }

  // One block makes the remaining merges. `all`: no row was looked at yet.
  __device__ void finish(bool all) {
    if (block_ == 0) {
      const int blocks = blocks_;
      blocks_ = 1;  // all rows are this block's
      greedy(all);
      blocks_ = blocks;
      if (threadIdx.x == 0) w_.state()->finished = done_;
    }
    meet();
    done_ = w_.state()->finished;
  }

  // Nothing is allowed any more. Groups only gain models, so every pair stays forbidden: lift the budgets, once.
  __device__ bool lift_or_stop() {
    if (compat_ || !exhausted_) {
      if (thread() == 0) {
        s_.status[rule::kDeadlock] = done_;
        if (lifted_) s_.status[rule::kLifted] -= merges_ - done_;  // those that were not made after all
      }
      return false;
    }
    exhausted_ = 0;
    lifted_ = true;
    if (thread() == 0) s_.status[rule::kLifted] = merges_ - done_;
    return true;
  }

  // --- budgets

  // Whether a budget may run out before the end. A merge inside a model leaves it one slot or group less, so one that
  // has as many merges as it has features but one forbids nothing when it is used up.
  __device__ bool watched() {
    __syncthreads();
    if (threadIdx.x < unsigned(models_)) m_.left[threadIdx.x] = w_.state()->left[threadIdx.x];
    __syncthreads();
    if (lifted_ || s_.budget >= n_ / models_ - 1) return false;
    bool watch = false;
    for (int m = 0; m < models_; ++m) watch |= !(exhausted_ >> m & 1) && m_.left[m] < merges_ - done_;
    return watch;
  }
  // The models whose budget a phase used up. At or below zero from the start, in compat mode, is not used up.
  __device__ void exhaust() {
    for (int m = 0; m < models_; ++m) {
      const int left = w_.state()->left[m];
      if (left <= 0 && left < budget()) exhausted_ |= 1 << m;
    }
  }
  __device__ int joined(int i, int j) { return i | (compat_ ? j & exhausted_ : j) | (alpha_ == 0 ? rule::kGone : 0); }

  // --- rounds

  // Merges all reciprocal first pairs, round after round; returns the best edge left open.
  __device__ Edge<scalar_t> rounds_until_settled(int need, bool watch, bool rebuilt, int* count) {
    for (int first = 0;; ++round_) {
      const bool all = first == 0 && *count == 0;
      const Edge<scalar_t> own = look(first, *count, round_, exhausted_, all, all && rebuilt);
      if (threadIdx.x == 0) w_.best()[block_] = own;
      meet();
      Edge<scalar_t> open = no_edge();
      for (int b = threadIdx.x; b < blocks_; b += kMatchThreads) improve(open, w_.best()[b]);
      open = block_first<kMatchThreads>(open, m_.scratch);
      if (!(open.value > 0) || settled(*count, need, watch, open)) {
        if (thread() == 0) w_.state()->count = 0;
        ++round_;
        return open;
      }
      merge_pairs(round_ + 1);
      meet();
      first = *count;
      *count = w_.state()->count;
    }
  }

  // Whether the merges that precede the open edge are enough, or use a budget up.
  __device__ bool settled(int count, int need, bool watch, const Edge<scalar_t>& open) {
    int least = need;
    for (int m = 0; watch && m < models_; ++m)
      if (!(exhausted_ >> m & 1)) least = m_.left[m] < least ? m_.left[m] : least;
    if (count < least || count == 0) return false;
    if (threadIdx.x <= kMostModels) m_.charge[threadIdx.x] = 0;
    __syncthreads();
    int mine = 0;  // lane m: merges inside model m; the last lane: all
    for (int base = warp() * 32; base < count; base += kMatchThreads) {
      const int t = base + lane();
      const bool before = t < count && precedes({w_.value()[t], w_.row_of()[t], w_.col_of()[t]}, open);
      const int shared = before && watch ? w_.shared()[t] : 0, all = __popc(__ballot_sync(kFullWarp, before));
      if (lane() == kMostModels) mine += all;
      for (int m = 0; watch && m < models_; ++m) {
        const int inside = __popc(__ballot_sync(kFullWarp, shared >> m & 1));
        if (lane() == m) mine += inside;
      }
    }
    if (mine) atomicAdd(&m_.charge[lane()], mine);
    __syncthreads();
    bool enough = m_.charge[kMostModels] >= need;
    for (int m = 0; watch && m < models_; ++m)
      enough |= !(exhausted_ >> m & 1) && m_.charge[m] > 0 && m_.charge[m] >= m_.left[m];
    __syncthreads();
    return enough;
  }

  // The pairs whose smaller slot is this block's: into the list, and their rows into one.  Whoever owns the other slot
  // only reads what is not written here.
  __device__ void merge_pairs(int round) {
    const int own = own_rows(), chunks = (w_.packs() + kChunk - 1) / kChunk;
    for (int base = 0; base < own; base += kMatchThreads) {
      if (threadIdx.x == 0) m_.lives = 0;
      __syncthreads();
      if (base + int(threadIdx.x) < own) {
        const int k = block_ + (base + int(threadIdx.x)) * blocks_, j = w_.arg()[k];
        if (j > k && w_.arg()[j] == k && w_.bound()[k] > 0) m_.live[atomicAdd(&m_.lives, 1)] = k;
      }
      __syncthreads();
      const int pairs = m_.lives;
      if (threadIdx.x == 0 && pairs) m_.at = atomicAdd(&w_.state()->count,
                                                       pairs);  // the order inside a round is free
      __syncthreads();
      if (int(threadIdx.x) < pairs) record(m_.at + int(threadIdx.x), m_.live[threadIdx.x], round);
      for (int item = warp(); item < pairs * chunks; item += kMatchWarps) {
        const int i = m_.live[item / chunks];
        this->merge_rows(i, w_.arg()[i], item % chunks);
      }
      __syncthreads();
    }
  }
  __device__ void record(int t, int i, int round) {
    const int j = w_.arg()[i], mi = w_.models()[i], mj = w_.models()[j];
    w_.row_of()[t] = i, w_.col_of()[t] = j;
    w_.value()[t] = w_.bound()[i];
    w_.shared()[t] = mi & mj;
    w_.stamp()[i] = w_.stamp()[j] = round;
    w_.models()[i] = joined(mi, mj);
    w_.models()[j] = mj | rule::kGone;
    w_.parent()[j] = i;
    w_.place()[j] = ++w_.merges()[i];
  }

  // --- from rounds to a sequence

  // rank[t]: how many merges of the phase precede merge t; a warp each.  Keys differ, so these are a permutation. Where
  // budgets count, also the position of the first merge that uses one up.
  __device__ void rank(int count, bool watch) {
    for (int t = block_ * kMatchWarps + warp(); t < count; t += warps()) {
      const Edge<scalar_t> e{w_.value()[t], w_.row_of()[t], w_.col_of()[t]};
      const int position = counted(count, e, ~0);
      if (lane() == 0) w_.rank()[t] = position;
      for (int inside = watch ? w_.shared()[t] & ~exhausted_ : 0; inside; inside &= inside - 1) {
        const int m = __ffs(inside) - 1, charged = counted(count, e, 1 << m) + 1;
        if (lane() == 0 && charged >= m_.left[m]) atomicMin(&w_.state()->event, position);
      }
    }
  }
  // One warp: the merges before an edge, all or those inside a model; valid in every lane.
  __device__ int counted(int count, const Edge<scalar_t>& e, int inside) {
    int before = 0;
    for (int u = lane(); u < count; u += 32)
      before +=
          precedes({w_.value()[u], w_.row_of()[u], w_.col_of()[u]}, e) && (inside == ~0 || (w_.shared()[u] & inside));
    for (int step = 16; step > 0; step >>= 1) before += __shfl_xor_sync(kFullWarp, before, step);
    return before;
  }

  // Writes the first `prefix` merges in order, and takes the others back as far as trees go.
  __device__ void book(int count, int prefix, bool watch) {
    for (int t = thread(); t < count; t += threads()) {
      const int at = w_.rank()[t], i = w_.row_of()[t], j = w_.col_of()[t];
      if (at < prefix) {
        write(done_ + at, i, j, w_.value()[t]);
        for (int inside = watch ? w_.shared()[t] : 0; inside; inside &= inside - 1)
          atomicAdd(&w_.state()->left[__ffs(inside) - 1], -1);
      } else {
        w_.parent()[j] = j;
        atomicAdd(&w_.merges()[i], -1);
      }
    }
    for (int k = thread(); k < n_; k += threads()) w_.first()[k] = -1;
    if (thread() == 0) w_.state()->grouped = 0;
  }
  __device__ void write(int at, int i, int j, scalar_t value) {
    s_.pair[2 * at] = i;
    s_.pair[2 * at + 1] = j;
    static_cast<scalar_t*>(s_.value)[at] = value;
  }

  // The state after the merges that were kept, but for the columns: those follow when rows are looked at.
  __device__ void rebuild() {
    const scalar_t* in = static_cast<const scalar_t*>(s_.sim);
    const bool aligned = n_ % kSize == 0 && reinterpret_cast<uintptr_t>(in) % 16 == 0;
    const int chunks = (w_.packs() + kChunk - 1) / kChunk;
    this->list_groups();
    meet();
    for (int64_t item = block_ * kMatchWarps + warp(); item < int64_t(n_) * chunks; item += warps()) {
      const int k = int(item / chunks), chunk = int(item % chunks);
      if (w_.parent()[k] != k) continue;
      this->group_row(in, aligned, k, chunk);
      if (chunk || lane()) continue;
      int models = w_.saved()[k] | (alpha_ == 0 && w_.merges()[k] ? rule::kGone : 0);
      for (int a = w_.first()[k]; a >= 0; a = w_.sibling()[a])
        if (w_.saved()[a] >= 0) models = joined(models, w_.saved()[a]);
      w_.models()[k] = models;
      if (w_.first()[k] >= 0) w_.grouped()[atomicAdd(&w_.state()->grouped, 1)] = k;
    }
    meet();
  }

  // --- one merge after the other

  // One block: the plain greedy, which needs no positive values, from any state. `all`: no row was looked at yet.
  __device__ void greedy(bool all) {
    const bool watch = watched();
    Edge<scalar_t> best = no_edge();
    for (bool again = true; done_ < merges_; again = false) {
      if (again || all) best = look(0, 0, -1, exhausted_, all, false);
      all = false;
      if (best.value != none())
        best = step(best, watch && !lifted_), ++done_;
      else if (lift_or_stop())
        all = true;
      else
        return;
    }
  }

  // Merges the best pair; returns the next one, valid in every thread.
  __device__ Edge<scalar_t> step(const Edge<scalar_t>& pair, bool watch) {
    const int i = pair.row, j = pair.col, mi = w_.models()[i], mj = w_.models()[j], joint = joined(mi, mj);
    int inside = watch ? mi & mj : 0, used = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
      m_.dirties = 0;
      for (int b = inside; b; b &= b - 1) --m_.left[__ffs(b) - 1];
    }
    __syncthreads();
    for (; inside; inside &= inside - 1)
      if (m_.left[__ffs(inside) - 1] <= 0) used |= inside & -inside;
    used &= ~exhausted_;
    exhausted_ |= used;
    if (threadIdx.x == 0) {
      write(done_, i, j, pair.value);
      w_.models()[i] = joint;
      w_.models()[j] = mj | rule::kGone;
      w_.parent()[j] = i;
      if (joint >= 0) w_.dirty()[atomicAdd(&m_.dirties, 1)] = i;
    }
    constexpr int kTwo = 2;
    Edge<scalar_t> best = no_edge();
    for (int k = threadIdx.x; k < n_; k += kMatchThreads * kTwo) {
      scalar_t v[kTwo] = {}, bound[kTwo] = {};
      int arg[kTwo] = {}, models[kTwo] = {};
      ZF_UNROLL
      for (int u = 0; u < kTwo; ++u) {  // all loads before the first store
        const int c = k + u * kMatchThreads;
        if (c >= n_) continue;
        v[u] = merged(row(i)[c], row(j)[c]);
        bound[u] = w_.bound()[c], arg[u] = w_.arg()[c];
        models[u] = c == i || c == j ? rule::kGone : w_.models()[c];
      }
      ZF_UNROLL
      for (int u = 0; u < kTwo; ++u) {
        const int c = k + u * kMatchThreads;
        if (c >= n_) continue;
        row(i)[c] = c == i ? none() : v[u];
        if (models[u] < 0) continue;
        row(c)[i] = v[u];
        const int forbids = rule::forbids(models[u], exhausted_);
        const scalar_t now = joint & forbids ? none() : v[u];
        if (arg[u] == i || arg[u] == j || (used && arg[u] >= 0 && (w_.models()[arg[u]] & forbids))) {
          w_.dirty()[atomicAdd(&m_.dirties, 1)] = c;
          continue;
        }
        if (now > bound[u] || (now == bound[u] && i < arg[u])) {
          w_.bound()[c] = bound[u] = now;
          w_.arg()[c] = arg[u] = i;
        }
        if (arg[u] >= 0) improve(best, edge(c, bound[u], arg[u]));
      }
    }
    __syncthreads();
    rescan(w_.dirty(), m_.dirties, exhausted_, best);
    return block_first<kMatchThreads>(best, m_.scratch);
  }

  // --- the result

  // Numbers the groups in the order of their slots.
  __device__ void label() {
    int* warp_total = m_.live;
    for (int base = 0, before = 0; block_ == 0 && base < n_; base += kMatchThreads) {
      const int k = base + int(threadIdx.x);
      const bool root = k < n_ && w_.parent()[k] == k;
      const unsigned roots = __ballot_sync(kFullWarp, root);
      if (lane() == 0) warp_total[warp()] = __popc(roots);
      __syncthreads();
      int mine = before + __popc(roots & ((1u << lane()) - 1));
      for (int other = 0; other < kMatchWarps; ++other) {
        if (other < warp()) mine += warp_total[other];
        before += warp_total[other];
      }
      if (root) w_.rank()[k] = mine;
      __syncthreads();
    }
    meet();
    for (int k = thread(); k < n_; k += threads()) {
      int root = k;
      while (w_.parent()[root] != root) root = w_.parent()[root];
      s_.group[k] = w_.rank()[root];
    }
  }

  // The same in every thread of the space.
  int done_ = 0, exhausted_ = 0, round_ = 1;
  bool lifted_ = false;
};

template <class scalar_t>
__global__ void __launch_bounds__(kMatchThreads) zip_match_kernel(const __grid_constant__ MatchJob job) {
  __shared__ MatchShared<scalar_t> shared;
  const int block = int(blockIdx.x);
  if (threadIdx.x == 0) shared.head = -1;
  __syncthreads();
  for (int s = threadIdx.x; s < job.spaces; s += kMatchThreads) {
    const MatchSpace& space = job.space[s];
    if (space.head && space.block <= block && block < space.block + space.blocks) shared.head = s;
  }
  __syncthreads();
  int s = shared.head;
  if (threadIdx.x == 0 && s >= 0 && block == job.space[s].block)
    reinterpret_cast<MatchState*>(static_cast<char*>(job.scratch) + job.space[s].scratch)->arrived = 0;
  cooperative_groups::this_grid().sync();
  for (; s >= 0; s = job.space[s].next) {
    Matcher<scalar_t>(job, job.space[s], shared).run(job.sequential);
    __syncthreads();  // the memory is the next space's; only single blocks take
                      // turns
  }
}

// Blocks that are resident together: one on each multiprocessor.
template <class scalar_t>
cudaError_t resident(int& blocks) {
#ifdef ZF_EMU
  blocks = 4;
#else
  int device = 0, processors = 0, each = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess)
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, zip_match_kernel<scalar_t>, kMatchThreads, 0);
  if (e != cudaSuccess) return e;
  blocks = processors * (each < 1 ? each : 1);
  if (blocks < 1) return cudaErrorInvalidConfiguration;
#endif
  return cudaSuccess;
}

template <class scalar_t>
cudaError_t launch(const MatchJob& job, cudaStream_t stream) {
  ZF_LAUNCH_COOP((zip_match_kernel<scalar_t>), unsigned(job.blocks), unsigned(kMatchThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace

cudaError_t zip_match_resident(DType dtype, int& blocks) {
  return dtype == DType::f64 ? resident<double>(blocks) : resident<float>(blocks);
}
int64_t zip_match_bytes(DType dtype, int64_t n, int64_t blocks) {
  return dtype == DType::f64 ? match_bytes<double>(n, blocks) : match_bytes<float>(n, blocks);
}

cudaError_t zip_match(DType dtype, const MatchJob& job, cudaStream_t stream) {
  return dtype == DType::f64 ? launch<double>(job, stream) : launch<float>(job, stream);
}

}  // namespace zipfast::cuda
