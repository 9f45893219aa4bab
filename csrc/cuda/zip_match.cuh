// SPDX-License-Identifier: Apache-2.0
// The matcher's board: the memory of one space, what a block does with its rows, and the barrier among the blocks that
// share the space.  zip_match.cu plays on it, in rounds or one merge after the other.
//
// The matrix never says what is forbidden.  A pair is forbidden if its slots share an exhausted model or one of them
// has left the pool (rule::forbids); in compat mode, where -inf is inherited, a slot therefore also carries the
// exhausted models of what it took in: the groups that could meet a -inf are exactly those that share such a model.  So
// the matrix depends on the merges alone, and on them only as a tree: every entry is the smallest of the input's
// entries between the two groups, each multiplied by alpha as many times as its two features were merged (min and
// rounding commute).  That is what `rebuild` relies on, which is why no second copy is kept for taking merges back.
#pragma once
#include "cuda/launch.h"
#include <climits>

#include "cuda/scope.cuh"
#include "rule.h"
#ifdef ZF_EMU
#include <chrono>
#include <thread>
#endif

namespace zipfast::cuda {

#ifdef ZF_EMU
constexpr int kMatchTile = 16;
#else
constexpr int kMatchTile = 64;
#endif
constexpr int kMatchWarps = kMatchThreads / 32, kMostModels = 31;
constexpr int kAhead = 4;  // 16-byte accesses that a lane has under way

// 16 bytes of a row.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// What the blocks of a space share besides the arrays; the counter has a line of its own.
struct alignas(128) MatchState {
  unsigned arrived;  // at barriers, by all blocks
  alignas(128) int count;
  int event;     // position of the first merge of the phase that exhausts a model
  int grouped;   // entries of MatchWork::grouped
  int finished;  // whether the tail made all merges
  int left[kMostModels];
};

// The scratch memory of a space: state, matrix, two arrays of values, the arrays of ints, one edge a block.
template <class scalar_t>
__host__ __device__ inline int64_t match_stride(int64_t n) {
  constexpr int64_t kPack = Pack<scalar_t>::kSize;
  return (n + kPack - 1) / kPack * kPack;
}
constexpr int kMatchInts = 15;
template <class scalar_t>
__host__ __device__ inline int64_t match_bytes(int64_t n, int64_t blocks) {
  const int64_t bytes = int64_t(sizeof(MatchState)) + (n + 2) * match_stride<scalar_t>(n) * int64_t(sizeof(scalar_t)) +
                        kMatchInts * ((n + 3) / 4 * 4) * int64_t(sizeof(int)) +
                        blocks * int64_t(sizeof(Edge<scalar_t>));
  return (bytes + 127) / 128 * 128;
}

// In shared memory, as registers are few; what is here is computed from two addresses.  [n] unless said otherwise.
template <class scalar_t>
class MatchWork {
 public:
  __device__ void set(char* scratch, int n) {
    stride_ = int(match_stride<scalar_t>(n)), ints_ = (n + 3) / 4 * 4;
    state_ = reinterpret_cast<MatchState*>(scratch);
    bound_ = reinterpret_cast<scalar_t*>(state_ + 1) + int64_t(n) * stride_;
  }
  __device__ int packs() const { return stride_ / Pack<scalar_t>::kSize; }  // of a row
  __device__ MatchState* state() const { return state_; }
  // [n, stride]; the diagonal and what lies beyond n are -inf.
  __device__ scalar_t* row(int k) const { return reinterpret_cast<scalar_t*>(state_ + 1) + int64_t(k) * stride_; }
  __device__ scalar_t* bound() const { return bound_; }            // row maxima
  __device__ scalar_t* value() const { return bound_ + stride_; }  // of the phase's merges
  __device__ int* models() const { return ints(0); }               // of each slot, and rule::kGone
  __device__ int* saved() const { return ints(1); }                // models as the phase began
  __device__ int* arg() const { return ints(2); }                  // first column of the row maximum, -1: none
  __device__ int* stamp() const { return ints(3); }                // round of the slot's last merge
  __device__ int* parent() const { return ints(4); }               // slot that it was merged into; itself while alive
  __device__ int* place() const { return ints(5); }                // as which merge of that slot
  __device__ int* merges() const { return ints(6); }               // in which the slot took another one in
  __device__ int* row_of() const { return ints(7); }               // the phase's merges, in rounds: slots i < j
  __device__ int* col_of() const { return ints(8); }
  __device__ int* shared() const { return ints(9); }    // models on both sides
  __device__ int* rank() const { return ints(10); }     // position of each in the phase; numbers of the groups at last
  __device__ int* first() const { return ints(11); }    // after a rebuild: members of each group but its slot, as lists
  __device__ int* sibling() const { return ints(12); }  // the next of them, -1: none
  __device__ int* depth() const { return ints(13); }    // merges that a feature took part in
  __device__ int* grouped() const { return ints(14); }  // groups of more than one
  __device__ int* dirty() const { return ints(10); }    // one after the other: rows to look at
  __device__ Edge<scalar_t>* best() const { return reinterpret_cast<Edge<scalar_t>*>(ints(kMatchInts)); }  // [blocks]

 private:
  __device__ int* ints(int a) const { return reinterpret_cast<int*>(bound_ + 2 * stride_) + int64_t(a) * ints_; }
  int stride_, ints_;
  MatchState* state_;
  scalar_t* bound_;
};

template <class scalar_t>
struct MatchShared {
  Edge<scalar_t> scratch[kMatchWarps];
  int live[kMatchThreads],
      dirty[kMatchThreads];  // rows of the batch at hand; the latter are looked
                             // at again
  int lives, dirties, at;
  int left[kMostModels + 1], charge[kMostModels + 1];
  int head;
  MatchWork<scalar_t> work;
  scalar_t tile[kMatchTile][kMatchTile + 1];
};

template <class scalar_t>
class MatchBoard {
 public:
  using Packed = Pack<scalar_t>;
  static constexpr int kSize = Packed::kSize;
  static constexpr int kChunk = 32 * kAhead;  // packs of a row that a warp takes at once

  __device__ MatchBoard(const MatchJob& job, const MatchSpace& space, MatchShared<scalar_t>& shared)
      : s_(space),
        n_(space.n),
        merges_(space.n - space.keep),
        models_(job.models),
        block_(int(blockIdx.x) - space.block),
        blocks_(space.blocks),
        alpha_(scalar_t(job.alpha)),
        compat_(job.compat),
        w_(shared.work),
        m_(shared) {
    if (threadIdx.x == 0) shared.work.set(static_cast<char*>(job.scratch) + space.scratch, space.n);
    __syncthreads();
  }

 protected:
  static __device__ scalar_t none() { return -scalar_t(INFINITY); }
  __device__ int lane() const { return int(threadIdx.x % 32); }
  __device__ int warp() const { return int(threadIdx.x / 32); }
  // Threads and warps of all blocks of the space.
  __device__ int thread() const { return block_ * kMatchThreads + int(threadIdx.x); }
  __device__ int threads() const { return blocks_ * kMatchThreads; }
  __device__ int warps() const { return blocks_ * kMatchWarps; }
  // Row k is of block k % blocks_.
  __device__ int own_rows() const { return (n_ - block_ + blocks_ - 1) / blocks_; }

  __device__ scalar_t* row(int k) const { return w_.row(k); }
  __device__ Packed* packs(int k) const { return reinterpret_cast<Packed*>(row(k)); }
  __device__ bool alive(int k) const { return w_.models()[k] >= 0; }
  __device__ Edge<scalar_t> no_edge() const { return {none(), n_, n_}; }
  __device__ static Edge<scalar_t> edge(int k, scalar_t value, int c) { return {value, k < c ? k : c, k < c ? c : k}; }
  __device__ static void improve(Edge<scalar_t>& best, const Edge<scalar_t>& e) {
    if (precedes(e, best)) best = e;
  }
  __device__ scalar_t merged(scalar_t a, scalar_t b) const { return rule::merged_similarity(alpha_, a, b); }

  // All blocks of the space wait for each other, and see what any wrote before. The counter only grows.
  __device__ void meet() {
    __syncthreads();
    if (blocks_ == 1) return;
    met_ += unsigned(blocks_);
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&w_.state()->arrived, 1u);
#ifdef ZF_EMU
      while (int(__atomic_load_n(&w_.state()->arrived, __ATOMIC_RELAXED) - met_) < 0)
        std::this_thread::sleep_for(std::chrono::microseconds(20));
#else
      while (int(*static_cast<volatile unsigned*>(&w_.state()->arrived) - met_) < 0) {
      }
#endif
      __threadfence();
    }
    __syncthreads();
  }

  __device__ int budget() const { return s_.budget < 0 ? 0 : s_.budget > n_ ? n_ : int(s_.budget); }

  // Copies the matrix, clears outputs and state; false if it holds NaN or is not symmetric.
  __device__ bool start() {
    scalar_t* value = static_cast<scalar_t*>(s_.value);
    if (thread() == 0) {
      s_.status[rule::kLifted] = 0;
      s_.status[rule::kDeadlock] = -1;
      s_.status[rule::kNanAt] = s_.status[rule::kAsymmetricAt] = INT64_MAX;
      w_.state()->count = 0;
      w_.state()->event = INT_MAX;
      for (int m = 0; m < models_; ++m) w_.state()->left[m] = budget();
    }
    for (int k = thread(); k < n_; k += threads()) {
      w_.models()[k] = 1 << (k / (n_ / models_));
      w_.parent()[k] = k;
      w_.stamp()[k] = w_.merges()[k] = 0;
      s_.group[k] = -1;
    }
    for (int t = thread(); t < merges_; t += threads()) {
      s_.pair[2 * t] = s_.pair[2 * t + 1] = -1;
      value[t] = scalar_t(NAN);
    }
    meet();
    const int side = (n_ + kMatchTile - 1) / kMatchTile;
    for (int64_t q = block_; q < int64_t(side) * side; q += blocks_)
      if (q / side <= q % side) copy_tiles(int(q / side) * kMatchTile, int(q % side) * kMatchTile);
    meet();
    return s_.status[rule::kNanAt] == INT64_MAX && s_.status[rule::kAsymmetricAt] == INT64_MAX;
  }

  // The tile at (i0, j0), j0 >= i0, and its mirror image: copied with -inf on the diagonal and beyond n, and compared.
  __device__ void copy_tiles(int i0, int j0) {
    constexpr int kArea = kMatchTile * kMatchTile;
    const scalar_t* in = static_cast<const scalar_t*>(s_.sim);
    for (int e = threadIdx.x; e < kArea; e += kMatchThreads)
      m_.tile[e / kMatchTile][e % kMatchTile] = copy(in, i0 + e / kMatchTile, j0 + e % kMatchTile);
    __syncthreads();
    for (int e = threadIdx.x; e < kArea; e += kMatchThreads) {
      const int j = e / kMatchTile,
                i = e % kMatchTile;  // of the tile; the columns of the mirror image
      const scalar_t v = i0 == j0 ? m_.tile[j][i] : copy(in, j0 + j, i0 + i), other = m_.tile[i][j];
      if (i0 + i < j0 + j && v == v && other == other && v != other)
        note(rule::kAsymmetricAt, int64_t(i0 + i) * n_ + j0 + j);
    }
    __syncthreads();
  }
  __device__ scalar_t copy(const scalar_t* in, int i, int j) {
    if (i >= n_ || j >= w_.packs() * kSize) return none();
    const scalar_t v = i == j || j >= n_ ? none() : in[int64_t(i) * n_ + j];
    if (v != v) note(rule::kNanAt, int64_t(i) * n_ + j);
    row(i)[j] = v;
    return v;
  }
  __device__ void note(int field, int64_t at) {
    atomicMin(reinterpret_cast<long long*>(s_.status + field), (long long)at);
  }

  // One warp: first edge of a part of row k over the allowed columns, as {value, 0, column}; valid in every lane.
  __device__ Edge<scalar_t> scan(int k, int part, int parts, int exhausted) const {
    const int forbidden = rule::forbids(w_.models()[k], exhausted), size = (w_.packs() + parts - 1) / parts;
    const int begin = part * size, end = begin + size < w_.packs() ? begin + size : w_.packs();
    const Packed* r = packs(k);
    Edge<scalar_t> best{none(), 0, n_};
    for (int p = begin + lane(); p < end; p += kChunk) {
      Packed x[kAhead];
      ZF_UNROLL
      for (int u = 0; u < kAhead; ++u)
        if (p + 32 * u < end) x[u] = r[p + 32 * u];
      ZF_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int q = p + 32 * u;
        if (q >= end) continue;
        const Pack<int> models = load_models(q);  // in the first-level cache, as all rows want them
        ZF_UNROLL
        for (int e = 0; e < kSize; ++e)
          if (!(models.at[e] & forbidden) && x[u].at[e] > best.value) best.value = x[u].at[e], best.col = q * kSize + e;
      }
    }
    return warp_first(best);
  }
  // Of the columns of a pack: four floats or two doubles.
  __device__ Pack<int> load_models(int pack) const {
    if constexpr (kSize == 4) {
      return reinterpret_cast<const Pack<int>*>(w_.models())[pack];
    } else {
      struct alignas(8) Two {
        int a, b;
      };
      const Two two = reinterpret_cast<const Two*>(w_.models())[pack];
      return {two.a, two.b};
    }
  }

  // The block: looks at the rows of a list again.  Few rows are cut into parts, so that no warp idles.  What becomes of
  // a row counts for `mine` of one thread.
  __device__ void rescan(const int* list, int rows, int exhausted, Edge<scalar_t>& mine) {
    int parts = kMatchWarps;
    while (parts > 1 && parts * rows > kMatchWarps) parts /= 2;
    const int part = warp() % parts, step = kMatchWarps / parts;
    for (int base = 0; base < rows; base += step) {
      const int q = base + warp() / parts;
      Edge<scalar_t> best{none(), 0, n_};
      if (q < rows) best = scan(list[q], part, parts, exhausted);
      if (parts > 1) {
        if (lane() == 0) m_.scratch[warp()] = best;
        __syncthreads();
        if (part == 0 && lane() == 0)
          for (int other = 1; other < parts; ++other) improve(best, m_.scratch[warp() + other]);
        __syncthreads();
      }
      if (part || lane() || q >= rows) continue;
      const int k = list[q];
      w_.bound()[k] = best.value;
      w_.arg()[k] = best.value == none() ? -1 : best.col;
      if (best.value != none()) improve(mine, edge(k, best.value, best.col));
    }
  }

  // One warp: row k's columns after the merges [first, last) of one round, in which no slot has two.
  __device__ void merge_columns(int k, int first, int last) {
    scalar_t* r = row(k);
    for (int t = first + lane(); t < last; t += kChunk) {
      int i[kAhead];
      scalar_t v[kAhead];
      ZF_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        if (t + 32 * u >= last) continue;
        i[u] = w_.row_of()[t + 32 * u];
        v[u] = merged(r[i[u]], r[w_.col_of()[t + 32 * u]]);
      }
      ZF_UNROLL
      for (int u = 0; u < kAhead; ++u)
        if (t + 32 * u < last) r[i[u]] = v[u];
    }
  }

  // One warp: a chunk of row i after its merge with row j.  The diagonal stays -inf.
  __device__ void merge_rows(int i, int j, int chunk) {
    Packed *a = packs(i), x[kAhead], y[kAhead];
    const Packed* b = packs(j);
    const int p = chunk * kChunk + lane();
    ZF_UNROLL
    for (int u = 0; u < kAhead; ++u)
      if (p + 32 * u < w_.packs()) x[u] = a[p + 32 * u], y[u] = b[p + 32 * u];
    ZF_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (p + 32 * u >= w_.packs()) continue;
      ZF_UNROLL
      for (int e = 0; e < kSize; ++e) x[u].at[e] = merged(x[u].at[e], y[u].at[e]);
      a[p + 32 * u] = x[u];
    }
  }

  // The block: brings its rows up to date with the merges [first, last) of a round, or with the groups of a rebuild,
  // and looks again at those whose first edge they touched, or at all.  The first edge of the block's rows; valid in
  // every thread.
  __device__ Edge<scalar_t> look(int first, int last, int round, int exhausted, bool all, bool rebuilt) {
    Edge<scalar_t> mine = no_edge();
    const int own = own_rows();
    for (int base = 0; base < own; base += kMatchThreads) {
      if (threadIdx.x == 0) m_.lives = m_.dirties = 0;
      __syncthreads();
      if (base + int(threadIdx.x) < own) {
        const int k = block_ + (base + int(threadIdx.x)) * blocks_;
        if (!alive(k)) {
          w_.arg()[k] = -1;
        } else {
          m_.live[atomicAdd(&m_.lives, 1)] = k;
          const int c = all ? -1 : w_.arg()[k];
          if (all || w_.stamp()[k] == round || (c >= 0 && w_.stamp()[c] == round))
            m_.dirty[atomicAdd(&m_.dirties, 1)] = k;
          else if (c >= 0)
            improve(mine, edge(k, w_.bound()[k], c));
        }
      }
      __syncthreads();
      for (int q = warp(); q < m_.lives && (rebuilt || first < last); q += kMatchWarps) {
        if (rebuilt)
          group_columns(m_.live[q]);
        else
          merge_columns(m_.live[q], first, last);
      }
      __syncthreads();
      rescan(m_.dirty, m_.dirties, exhausted, mine);
      __syncthreads();
    }
    return block_first<kMatchThreads>(mine, m_.scratch);
  }

  // --- taking merges back: every group anew from the input

  // An entry after `depth` merges.  The addition makes zeros positive: members come in any order.
  __device__ scalar_t scaled(scalar_t v, int depth) const {
    for (int d = 0; d < depth; ++d) v = alpha_ * v + scalar_t(0);
    return v;
  }

  // Lists the members of each group below its slot, with the number of merges that each took part in.
  __device__ void list_groups() {
    for (int k = thread(); k < n_; k += threads()) {
      int root = k, depth = w_.merges()[k];
      while (w_.parent()[root] != root) {
        const int into = w_.parent()[root];
        depth += 1 + w_.merges()[into] - w_.place()[root];
        root = into;
      }
      w_.depth()[k] = depth;
      if (root == k) continue;
      w_.sibling()[k] = atomicExch(&w_.first()[root], k);
      w_.models()[k] = w_.saved()[k] | rule::kGone;
    }
  }

  // One warp: a chunk of the row of group k, with single features as columns.
  __device__ void group_row(const scalar_t* in, bool aligned, int k, int chunk) {
    Packed best[kAhead];
    const int p = chunk * kChunk + lane();
    for (int a = k; a >= 0; a = a == k ? w_.first()[k] : w_.sibling()[a]) {
      const int depth = w_.depth()[a];
      Packed x[kAhead];
      ZF_UNROLL
      for (int u = 0; u < kAhead; ++u)
        if (p + 32 * u < w_.packs()) x[u] = load_input(in, aligned, a, p + 32 * u);
      for (int d = 0; d < depth; ++d) {
        ZF_UNROLL
        for (int u = 0; u < kAhead; ++u) {
          ZF_UNROLL
          for (int e = 0; e < kSize; ++e) x[u].at[e] = scaled(x[u].at[e], 1);
        }
      }
      ZF_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        ZF_UNROLL
        for (int e = 0; e < kSize; ++e)
          if (a == k || x[u].at[e] < best[u].at[e]) best[u].at[e] = x[u].at[e];
      }
    }
    ZF_UNROLL
    for (int u = 0; u < kAhead; ++u)
      if (p + 32 * u < w_.packs()) packs(k)[p + 32 * u] = best[u];
  }
  __device__ Packed load_input(const scalar_t* in, bool aligned, int k, int pack) const {
    const scalar_t* r = in + int64_t(k) * n_;
    if (aligned) return reinterpret_cast<const Packed*>(r)[pack];
    Packed x;
    ZF_UNROLL
    for (int e = 0; e < kSize; ++e) x.at[e] = pack * kSize + e < n_ ? r[pack * kSize + e] : none();
    return x;
  }

  // One warp: row k's columns from single features to groups.  The diagonal comes from the input: what was made of it
  // is in the columns of the row's own group.
  __device__ void group_columns(int k) {
    scalar_t* r = row(k);
    for (int g = lane(); g < w_.state()->grouped; g += 32) {
      const int c = w_.grouped()[g];
      if (c == k) continue;
      scalar_t best = scaled(r[c], w_.depth()[c]);
      for (int a = w_.first()[c]; a >= 0; a = w_.sibling()[a]) {
        const scalar_t v = scaled(r[a], w_.depth()[a]);
        if (v < best) best = v;
      }
      r[c] = best;
    }
    if (lane() == 0) r[k] = none();
  }

  const MatchSpace& s_;
  int n_, merges_, models_, block_, blocks_;
  scalar_t alpha_;
  bool compat_;
  unsigned met_ = 0;  // what the counter will show when all blocks arrived
  const MatchWork<scalar_t>& w_;
  MatchShared<scalar_t>& m_;
};

}  // namespace zipfast::cuda
