// SPDX-License-Identifier: Apache-2.0
// zip_match on a GPU: rounds of reciprocal nearest neighbours, exact to the last tie (Stoica et al. 2024, section 4.3).
//
// Edges are ordered by value (descending), then row, then column.  Why a round may merge every pair that is first in
// both of its rows: while values are positive, alpha <= 1 and forbidden pairs only multiply, (1) no edge ever rises,
// (2) rounding is monotone, so disjoint merges give the same bits in any order, (3) such a pair stays first in both
// rows until it is executed, so the sequential greedy executes it at this very value, and (4) greedy's keys strictly
// fall: the executed merges, sorted by key, are its sequence.  A round-loop ends once `need` executed merges precede
// the best open edge, or no positive edge is left.
//
// Budgets forbid pairs from one merge on, so the work goes in phases: run rounds, sort, find the first merge that
// exhausts a model, restore the phase's start, replay the merges before it, forbid, go on (at most M + 1 phases).
// Values <= 0 break (1): one block finishes them sequentially, from the same state.
//
// One cooperative launch serves all spaces, one after the other, with every block working on each.  Decisions that
// steer the loops are computed by every block from the same data, which is not written again before the next grid
// barrier. Cost: 5 to 40 rounds on real networks, each reading the invalid rows once; memory two copies of the largest
// matrix.
#include "cuda/scope.cuh"
#include "cuda/launch.h"
#include "rule.h"

namespace zipfast::cuda {
namespace {

#ifdef ZF_EMU
constexpr int kThreads = 64;
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarps = kThreads / 32, kMostModels = 31;

// What steers the phases; written by one thread between two grid barriers.
struct State {
  int done, count, prefix, event, exhausted, lifted;
  long long left[kMostModels];
};

// The scratch memory of the space at hand; [n] unless said otherwise.
template <class scalar_t>
struct Work {
  State* state;
  scalar_t *sim, *saved_sim;    // [n, n]
  scalar_t *bound, *value;      // row maxima; values of the phase's merges
  int *models, *saved_models;   // models of each slot, and rule::kGone
  int *parent, *saved_parent;   // slot that a slot was merged into; itself while alive
  int *arg, *valid;             // first column of the row maximum; whether bound and arg hold
  int *row, *col, *shared;      // the phase's merges, in rounds: slots i < j, models on both sides
  int *order, *rank, *touched;  // merges by key; position of each; slots that the round at hand merges
  int* round_start;             // [n + 1]
};
constexpr int kIntArrays = 13;

template <class scalar_t>
__host__ __device__ inline int64_t scratch_bytes(int64_t n) {
  return (sizeof(State) + 15) / 16 * 16 + 2 * n * n * int64_t(sizeof(scalar_t)) + 2 * n * int64_t(sizeof(scalar_t)) +
         (kIntArrays * n + 1) * int64_t(sizeof(int)) + 64;
}

template <class scalar_t>
__device__ inline Work<scalar_t> carve(void* scratch, int64_t n) {
  Work<scalar_t> w;
  char* p = static_cast<char*>(scratch);
  w.state = reinterpret_cast<State*>(p);
  scalar_t* s = reinterpret_cast<scalar_t*>(p + (sizeof(State) + 15) / 16 * 16);
  w.sim = s, w.saved_sim = s + n * n, w.bound = s + 2 * n * n, w.value = w.bound + n;
  int* i = reinterpret_cast<int*>(w.value + n);
  int** arrays[kIntArrays] = {&w.models, &w.saved_models, &w.parent, &w.saved_parent, &w.arg,     &w.valid,      &w.row,
                              &w.col,    &w.shared,       &w.order,  &w.rank,         &w.touched, &w.round_start};
  for (int a = 0; a < kIntArrays; ++a) *arrays[a] = i + a * n;
  return w;
}

template <class scalar_t>
class Matcher {
 public:
  __device__ Matcher(const MatchJob& job, const MatchSpace& space, Edge<scalar_t>* scratch)
      : n_(space.n),
        merges_(space.n - space.keep),
        models_(job.models),
        alpha_(scalar_t(job.alpha)),
        compat_(job.compat),
        s_(space),
        w_(carve<scalar_t>(job.scratch, job.largest)),
        scratch_(scratch),
        thread_(blockIdx.x * kThreads + threadIdx.x),
        threads_(gridDim.x * kThreads) {}

  __device__ void run() {
    if (!start()) return;
    for (;;) {
      const int exhausted = w_.state->exhausted, need = merges_ - w_.state->done;
      if (need == 0) break;
      save();
      sync();
      int rounds = 0, count = 0;
      const Edge<scalar_t> open = rounds_until_settled(need, exhausted, &rounds, &count);
      sort(count);
      sync();
      if (thread_ == 0) book(need, count);
      sync();
      const int prefix = w_.state->prefix, done = w_.state->done;
      const bool event = w_.state->event;
      if (prefix < count) {
        restore(done < merges_);
        sync();
        for (int r = 0; r < rounds; ++r)
          apply(w_.round_start[r], r + 1 < rounds ? w_.round_start[r + 1] : count, prefix, exhausted, done < merges_);
      }
      if (done == merges_) break;
      for (int k = thread_; k < n_; k += threads_) w_.valid[k] = 0;
      sync();
      if (event) continue;
      if (open.value == none()) {
        if (!compat_ && exhausted) {  // groups only gain models: every pair stays forbidden, so lift once
          if (thread_ == 0) w_.state->exhausted = 0, lift(done);
          sync();
          continue;
        }
        if (thread_ == 0) deadlock(done);
        return;
      }
      if (blockIdx.x == 0) finish_sequentially();
      sync();
      break;
    }
    sync();
    if (w_.state->done == merges_) label();
  }

 private:
  static __device__ scalar_t none() { return -scalar_t(INFINITY); }
  __device__ void sync() { cooperative_groups::this_grid().sync(); }
  __device__ scalar_t* row(int k) { return w_.sim + int64_t(k) * n_; }
  __device__ bool alive(int k) { return w_.models[k] >= 0; }
  __device__ Edge<scalar_t> no_edge() { return {none(), n_, n_}; }
  __device__ Edge<scalar_t> edge_of(int k) {
    const int c = w_.arg[k];
    return c < 0 ? no_edge() : Edge<scalar_t>{w_.bound[k], k < c ? k : c, k < c ? c : k};
  }
  __device__ void lift(int done) {
    w_.state->lifted = 1;
    s_.status[rule::kLifted] = merges_ - done;
  }

  __device__ void deadlock(int done) {
    s_.status[rule::kDeadlock] = done;
    if (w_.state->lifted) s_.status[rule::kLifted] -= merges_ - done;  // those that were not made after all
  }

  // Copies the matrix (diagonal -inf), clears outputs; false if it holds NaN or is not symmetric.
  __device__ bool start() {
    const scalar_t* in = static_cast<const scalar_t*>(s_.sim);
    scalar_t* value = static_cast<scalar_t*>(s_.value);
    if (thread_ == 0) {
      s_.status[rule::kLifted] = 0;
      s_.status[rule::kDeadlock] = -1;
      s_.status[rule::kNanAt] = s_.status[rule::kAsymmetricAt] = INT64_MAX;
      *w_.state = State{};
      if (!compat_ && s_.budget <= 0) w_.state->exhausted = int((1u << models_) - 1);
      for (int m = 0; m < models_; ++m) w_.state->left[m] = s_.budget;
    }
    for (int k = thread_; k < n_; k += threads_) {
      w_.models[k] = 1 << (k / (n_ / models_));
      w_.parent[k] = k;
      w_.valid[k] = w_.touched[k] = 0;
      s_.group[k] = -1;
    }
    for (int t = thread_; t < merges_; t += threads_) {
      s_.pair[2 * t] = s_.pair[2 * t + 1] = -1;
      value[t] = scalar_t(NAN);
    }
    sync();
    for (int64_t e = thread_; e < int64_t(n_) * n_; e += threads_) {
      const int i = int(e / n_), j = int(e % n_);
      const scalar_t v = i == j ? none() : in[e];
      w_.sim[e] = v;
      if (v != v)
        atomicMin(reinterpret_cast<long long*>(s_.status + rule::kNanAt), (long long)e);
      else if (i < j && v != in[int64_t(j) * n_ + i])
        atomicMin(reinterpret_cast<long long*>(s_.status + rule::kAsymmetricAt), (long long)e);
    }
    sync();
    const bool has_nan = s_.status[rule::kNanAt] != INT64_MAX, asymmetric = s_.status[rule::kAsymmetricAt] != INT64_MAX;
    sync();
    if (thread_ == 0) {
      if (!has_nan) s_.status[rule::kNanAt] = -1;
      if (has_nan || !asymmetric) s_.status[rule::kAsymmetricAt] = -1;
    }
    return !has_nan && !asymmetric;
  }

  __device__ void save() {
    for (int64_t e = thread_; e < int64_t(n_) * n_; e += threads_) w_.saved_sim[e] = w_.sim[e];
    for (int k = thread_; k < n_; k += threads_) {
      w_.saved_models[k] = w_.models[k];
      w_.saved_parent[k] = w_.parent[k];
    }
    if (thread_ == 0) w_.state->count = 0;
  }
  __device__ void restore(bool matrix) {
    if (matrix)
      for (int64_t e = thread_; e < int64_t(n_) * n_; e += threads_) w_.sim[e] = w_.saved_sim[e];
    for (int k = thread_; k < n_; k += threads_) {
      w_.models[k] = w_.saved_models[k];
      w_.parent[k] = w_.saved_parent[k];
    }
  }

  // One warp: maximum and first maximal column of row k over the allowed ones; valid in every lane.
  __device__ void rescan(int k, int exhausted) {
    const int lane = threadIdx.x % 32, forbidden = rule::forbids(w_.models[k], exhausted);
    const scalar_t* r = row(k);
    Edge<scalar_t> best = no_edge();
    for (int c = lane; c < n_; c += 32)
      if (!(w_.models[c] & forbidden) && r[c] > best.value) best = {r[c], 0, c};
    best = warp_first(best);
    if (lane == 0) {
      w_.bound[k] = best.value;
      w_.arg[k] = best.value == none() ? -1 : best.col;
      w_.valid[k] = 1;
    }
  }

  // The first edge over all rows; valid in every thread, the same in every block.
  __device__ Edge<scalar_t> first_edge() {
    Edge<scalar_t> best = no_edge();
    for (int k = threadIdx.x; k < n_; k += kThreads) {
      if (!alive(k)) continue;
      const Edge<scalar_t> e = edge_of(k);
      if (precedes(e, best)) best = e;
    }
    return block_first<kThreads>(best, scratch_);
  }

  // How many of the phase's merges precede an edge; valid in every thread.
  __device__ int settled(int count, const Edge<scalar_t>& open) {
    int* total = reinterpret_cast<int*>(scratch_);
    if (threadIdx.x == 0) *total = 0;
    __syncthreads();
    int mine = 0;
    for (int t = threadIdx.x; t < count; t += kThreads) mine += precedes({w_.value[t], w_.row[t], w_.col[t]}, open);
    if (mine) atomicAdd(total, mine);
    __syncthreads();
    const int result = *total;
    __syncthreads();
    return result;
  }

  // Merges all reciprocal first pairs, round after round; returns the best edge left open.
  __device__ Edge<scalar_t> rounds_until_settled(int need, int exhausted, int* rounds, int* count) {
    for (;;) {
      for (int k = thread_ / 32; k < n_; k += threads_ / 32)
        if (alive(k) && !w_.valid[k]) rescan(k, exhausted);
      sync();
      const Edge<scalar_t> open = first_edge();
      if (!(open.value > 0) || settled(*count, open) >= need) return open;
      for (int i = thread_; i < n_; i += threads_) {
        if (!alive(i)) continue;
        const int j = w_.arg[i];
        if (j <= i || w_.arg[j] != i || !(w_.bound[i] > 0)) continue;
        const int t = atomicAdd(&w_.state->count, 1);  // the order inside a round is free: merges are sorted later
        w_.row[t] = i, w_.col[t] = j;
        w_.value[t] = w_.bound[i];
        w_.shared[t] = w_.models[i] & w_.models[j];
        w_.rank[t] = 0;
      }
      if (thread_ == 0) w_.round_start[*rounds] = *count;
      sync();
      const int first = *count;
      *count = w_.state->count;
      ++*rounds;
      apply(first, *count, n_, exhausted, true);
    }
  }

  // Executes merges [first, last) of one round whose rank is below `prefix`: rows, then columns, then the groups.  Ends
  // with a barrier.
  __device__ void apply(int first, int last, int prefix, int exhausted, bool matrix) {
    for (int t = first + thread_; t < last; t += threads_)
      if (w_.rank[t] < prefix) w_.touched[w_.row[t]] = w_.touched[w_.col[t]] = 1;
    if (matrix) {
      for (int t = first + thread_ / 32; t < last; t += threads_ / 32) {
        if (w_.rank[t] >= prefix) continue;
        const int i = w_.row[t], j = w_.col[t];
        const int forbidden = rule::forbids(w_.models[i], exhausted) | rule::forbids(w_.models[j], exhausted);
        scalar_t *a = row(i), *b = row(j);
        for (int c = threadIdx.x % 32; c < n_; c += 32) a[c] = merged(a[c], b[c], w_.models[c] & forbidden);
      }
    }
    sync();
    for (int k = thread_ / 32; k < n_; k += threads_ / 32) {
      if (!alive(k)) continue;
      scalar_t* r = row(k);
      const int forbids = rule::forbids(w_.models[k], exhausted);
      if (matrix) {
        for (int t = first + threadIdx.x % 32; t < last; t += 32) {
          if (w_.rank[t] >= prefix) continue;
          const int i = w_.row[t], j = w_.col[t];
          r[i] = k == i ? none() : merged(r[i], r[j], (w_.models[i] | w_.models[j]) & forbids);
        }
      }
      if (threadIdx.x % 32 == 0 && (w_.touched[k] || (w_.arg[k] >= 0 && w_.touched[w_.arg[k]]))) w_.valid[k] = 0;
    }
    sync();
    for (int t = first + thread_; t < last; t += threads_) {
      if (w_.rank[t] >= prefix) continue;
      const int i = w_.row[t], j = w_.col[t];
      w_.touched[i] = w_.touched[j] = 0;
      join(i, j);
    }
    sync();
  }

  __device__ scalar_t merged(scalar_t a, scalar_t b, int forbidden) {
    return compat_ && forbidden ? none() : rule::merged_similarity(alpha_, a, b);
  }
  __device__ void join(int i, int j) {
    if (!compat_) w_.models[i] |= w_.models[j];
    w_.models[j] |= rule::kGone;
    w_.parent[j] = i;
    if (alpha_ == 0) w_.models[i] |= rule::kGone;
  }

  // rank[t]: how many merges of the phase precede merge t.  Keys differ, so the ranks are a permutation.
  __device__ void sort(int count) {
    for (int t = thread_; t < count; t += threads_) {
      const Edge<scalar_t> e{w_.value[t], w_.row[t], w_.col[t]};
      int r = 0;
      for (int u = 0; u < count; ++u) r += precedes({w_.value[u], w_.row[u], w_.col[u]}, e);
      w_.rank[t] = r;
      w_.order[r] = t;
    }
  }

  // One thread: writes the phase's merges in order, up to the first that exhausts a model.
  __device__ void book(int need, int count) {
    State& state = *w_.state;
    const int most = count < need ? count : need;
    state.event = 0;
    state.prefix = most;
    for (int p = 0; p < most; ++p) {
      const int t = w_.order[p];
      write(state.done + p, w_.row[t], w_.col[t], w_.value[t]);
      if (charge(w_.shared[t])) {
        state.event = 1;
        state.prefix = p + 1;
        break;
      }
    }
    state.done += state.prefix;
  }
  __device__ void write(int at, int i, int j, scalar_t value) {
    s_.pair[2 * at] = i;
    s_.pair[2 * at + 1] = j;
    static_cast<scalar_t*>(s_.value)[at] = value;
  }
  // Charges a merge to the models on both of its sides; true if one of them is exhausted by it.
  __device__ bool charge(int shared) {
    State& state = *w_.state;
    if (!shared || state.lifted) return false;
    const int before = state.exhausted;
    for (int m = 0; m < models_; ++m)
      if (shared >> m & 1 && --state.left[m] <= 0) state.exhausted |= 1 << m;
    return state.exhausted != before;
  }

  // One block: the plain greedy, which needs no positive values.
  __device__ void finish_sequentially() {
    __shared__ int exhausted, stop;
    for (;;) {
      if (threadIdx.x == 0) exhausted = w_.state->exhausted, stop = w_.state->done == merges_;
      __syncthreads();
      if (stop) return;
      for (int k = threadIdx.x / 32; k < n_; k += kWarps)
        if (alive(k) && !w_.valid[k]) rescan(k, exhausted);
      __syncthreads();
      const Edge<scalar_t> best = first_edge();
      if (best.value == none()) {
        if (compat_ || !exhausted) {
          if (threadIdx.x == 0) deadlock(w_.state->done);
          return;
        }
        if (threadIdx.x == 0) w_.state->exhausted = 0, lift(w_.state->done);
        for (int k = threadIdx.x; k < n_; k += kThreads) w_.valid[k] = 0;
        __syncthreads();
        continue;
      }
      const int i = best.row, j = best.col;
      const int forbidden = rule::forbids(w_.models[i], exhausted) | rule::forbids(w_.models[j], exhausted);
      for (int c = threadIdx.x; c < n_; c += kThreads) {
        const scalar_t v = c == i ? none() : merged(row(i)[c], row(j)[c], w_.models[c] & forbidden);
        row(i)[c] = v;
        row(c)[i] = v;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        write(w_.state->done++, i, j, best.value);
        const int shared = w_.models[i] & w_.models[j];
        join(i, j);
        w_.valid[i] = 0;
        stop = charge(shared);  // here: whether rows must be looked at again
        exhausted = w_.state->exhausted;
      }
      __syncthreads();
      for (int k = threadIdx.x; k < n_; k += kThreads) {
        if (!alive(k) || k == i) continue;
        const int forbids = rule::forbids(w_.models[k], exhausted), arg = w_.arg[k];
        const scalar_t v = w_.models[i] & forbids ? none() : row(k)[i];
        if (arg == i || arg == j || (stop && arg >= 0 && (w_.models[arg] & forbids))) {
          w_.valid[k] = 0;
        } else if (v > w_.bound[k] || (v == w_.bound[k] && i < arg)) {
          w_.bound[k] = v;
          w_.arg[k] = i;
        }
      }
      __syncthreads();
    }
  }

  __device__ void label() {
    for (int k = thread_; k < n_; k += threads_) {
      int root = k;
      while (w_.parent[root] != root) root = w_.parent[root];
      int64_t before = 0;
      for (int c = 0; c < root; ++c) before += w_.parent[c] == c;
      s_.group[k] = before;
    }
  }

  int n_, merges_, models_;
  scalar_t alpha_;
  bool compat_;
  const MatchSpace& s_;
  Work<scalar_t> w_;
  Edge<scalar_t>* scratch_;
  int thread_, threads_;
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads) zip_match_kernel(const MatchJob job) {
  __shared__ Edge<scalar_t> scratch[kWarps];
  for (int s = 0; s < job.spaces; ++s) {
    Matcher<scalar_t>(job, job.space[s], scratch).run();
    cooperative_groups::this_grid().sync();  // the scratch memory is the next space's
  }
}

// Blocks that can be resident together; the matrix of a small space does not feed more than a few.
template <class scalar_t>
cudaError_t launch(const MatchJob& job, cudaStream_t stream) {
#ifdef ZF_EMU
  unsigned blocks = 3;
#else
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess)
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, zip_match_kernel<scalar_t>, kThreads, 0);
  if (e != cudaSuccess) return e;
  const int resident = processors * (per_processor < 2 ? per_processor : 2),
            useful = (job.largest + kWarps - 1) / kWarps;
  unsigned blocks = unsigned(resident < useful ? resident : useful);
#endif
  ZF_LAUNCH_COOP((zip_match_kernel<scalar_t>), blocks, unsigned(kThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace

int64_t zip_match_scratch(DType dtype, int64_t largest) {
  return dtype == DType::f64 ? scratch_bytes<double>(largest) : scratch_bytes<float>(largest);
}

cudaError_t zip_match(DType dtype, const MatchJob& job, cudaStream_t stream) {
  return dtype == DType::f64 ? launch<double>(job, stream) : launch<float>(job, stream);
}

}  // namespace zipfast::cuda
