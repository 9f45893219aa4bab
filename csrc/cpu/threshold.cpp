// SPDX-License-Identifier: Apache-2.0
// threshold on the CPU: the exact k of smallest magnitude, over lists of tensors, as packed masks (Frankle & Carbin
// 2019, section 1).
//
// A sample brackets rank k.  One pass over pieces of kPiece elements writes the bits of all that lies above the
// bracket, counts it, and collects what lies inside (2-3 % of the data): there the threshold is found, and there the
// remaining bits are set.  Ties are counted piece by piece, in order, so that exactly the first ones go.  Where the
// bracket misses, or where too much lies inside (many equal values), digits of 11 bits are counted instead, and a last
// pass writes.  Bandwidth-bound: every element is read once.  All counts are integers: the result does not depend on
// the number of threads, nor on which way was taken.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/simd.h"
#include "rule.h"
#include "stable.h"

namespace zipfast {
namespace {

constexpr int64_t kPiece = 32768, kWord = 64;  // a place in a piece has 16 bits
constexpr int64_t kSmall = 16384;              // so few are all collected
constexpr int64_t kCrowded = kPiece / 4;       // more inside the bracket is too much to collect
constexpr int64_t kThin = 64;                  // a sample of fewer survivors says nothing
constexpr double kSigmas = 4;                  // of the sample's rank, on either side
constexpr int kBins = 4096;                    // of what was collected
constexpr int64_t kFinite = std::numeric_limits<int64_t>::max();

struct Source {
  const void* data;
  const uint8_t* mask;  // null: all alive
  uint8_t* kept;
  int64_t size, tensor;
};

struct Piece {
  const Source* source;
  int64_t begin, end, group;
  int64_t alive = 0, above = 0, nan = -1;
  int64_t ties = 0, skip = 0;   // equal to the threshold; how many of them go
  std::vector<int64_t> key;     // inside the bracket, in order
  std::vector<uint16_t> place;  // of these
};

// Of the survivors: keys from `high` on are kept whatever the threshold is, those below `low` go.
struct Group {
  DType dtype = DType::f32;
  int64_t drop = 0, size = 0, survivors = 0, k = 0;
  int64_t low = 0, high = 0;
  int64_t threshold = 0;        // keys below go, and the first `ties` of those that are equal
  int64_t ties = 0, equal = 0;  // `equal`: how many there are
  size_t first = 0, last = 0;   // pieces
  size_t source_first = 0, source_last = 0;
  bool sampled = false, by_digits = false;
};

ZF_INLINE uint64_t load_word(const uint8_t* mask, int64_t word) {
  uint64_t bits;
  memcpy(&bits, mask + 8 * word, sizeof bits);
  return bits;
}
ZF_INLINE void store_word(uint8_t* mask, int64_t word, uint64_t bits) { memcpy(mask + 8 * word, &bits, sizeof bits); }

// Survivors among elements [at, at + 64) of a tensor.
ZF_INLINE uint64_t alive_word(const Source& s, int64_t at) {
  const int64_t left = s.size - at;
  const uint64_t real = left >= kWord ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
  return s.mask ? load_word(s.mask, at / kWord) & real : real;
}

// Bit i: is flag[i], which is 0 or 255, set?
ZF_INLINE uint64_t bits_of(const uint8_t* flag) {
  uint64_t bits = 0;
#if defined(__SSE2__)
  for (int b = 0; b < 4; ++b) {
    const __m128i quarter = _mm_load_si128(reinterpret_cast<const __m128i*>(flag) + b);
    bits |= uint64_t(uint16_t(_mm_movemask_epi8(quarter))) << (16 * b);
  }
#else
  for (int b = 0; b < 8; ++b) {
    uint64_t eight;  // one bit each, gathered by a product into the top byte
    memcpy(&eight, flag + 8 * b, sizeof eight);
    bits |= (((eight & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << (8 * b);
  }
#endif
  return bits;
}

template <class scalar_t>
ZF_INLINE typename rule::Magnitude<scalar_t>::key_t key_at(const void* data, int64_t at) {
  typename rule::Magnitude<scalar_t>::key_t bits;
  memcpy(&bits, static_cast<const char*>(data) + at * int64_t(sizeof bits), sizeof bits);
  return rule::magnitude_key<scalar_t>(bits);
}

template <class scalar_t>
ZF_INLINE void find_nan(Piece& piece) {
  for (int64_t at = piece.begin; at < piece.end; ++at)
    if (key_at<scalar_t>(piece.source->data, at) == rule::Magnitude<scalar_t>::kNan &&
        (alive_word(*piece.source, at / kWord * kWord) >> (at % kWord) & 1)) {
      piece.nan = at;
      return;
    }
}

// Calls f(first element of the word, its survivors, those from `high` on, those from `low` to before `high`, keys) for
// each word of a piece that has survivors or not; `high` may be one more than any key.  Returns whether f never stopped
// it, and notes the first NaN.
template <class scalar_t, class F>
ZF_INLINE bool each_word(Piece& piece, int64_t low_, int64_t high_, F&& f) {
  using key_t = typename rule::Magnitude<scalar_t>::key_t;
  constexpr int kLanes = 64 / int(sizeof(key_t));
  const Source& source = *piece.source;
  const key_t low = key_t(low_), high = key_t(high_);
  alignas(64) key_t key[kWord], top[kLanes] = {};
  alignas(64) uint8_t flag[kWord], over[kWord];
  for (int64_t at = piece.begin; at < piece.end; at += kWord) {
    const uint64_t alive = alive_word(source, at);
    if (alive == 0) {
      if (!f(at, alive, uint64_t(0), uint64_t(0), key)) return false;
      continue;
    }
    const int64_t n = std::min(kWord, piece.end - at);
    const char* data = static_cast<const char*>(source.data) + at * int64_t(sizeof(key_t));
    key_t bits[kWord];
    if (n < kWord) {
      memset(bits, 0, sizeof bits);
      memcpy(bits, data, size_t(n) * sizeof(key_t));
      data = reinterpret_cast<const char*>(bits);
    }
    for (int i = 0; i < kWord; ++i) {
      key_t raw;
      memcpy(&raw, data + i * int64_t(sizeof raw), sizeof raw);
      key[i] = rule::magnitude_key<scalar_t>(raw);
    }
    for (int i = 0; i < kWord; i += kLanes)
      for (int l = 0; l < kLanes; ++l) top[l] = std::max(top[l], key[i + l]);
    for (int i = 0; i < kWord; ++i) over[i] = key[i] >= high ? 255 : 0;
    for (int i = 0; i < kWord; ++i) flag[i] = key[i] >= low ? 255 : 0;
    const uint64_t above = bits_of(over);
    if (!f(at, alive, above & alive, bits_of(flag) & ~above & alive, key)) return false;
  }
  if (*std::max_element(top, top + kLanes) == rule::Magnitude<scalar_t>::kNan) find_nan<scalar_t>(piece);
  return true;
}

struct Stage {  // what a piece may collect, one for each thread at work
  std::unique_ptr<int64_t[]> key{new int64_t[kPiece]};
  std::unique_ptr<uint16_t[]> place{new uint16_t[kPiece]};
};

template <class scalar_t>
ZF_INLINE bool collect(Piece& piece, const Group& group, Stage& stage) {
  int64_t count = 0, above = 0;
  const int64_t most = group.sampled ? kCrowded - kWord : kPiece;
  const Source& source = *piece.source;
  const bool whole = each_word<scalar_t>(piece, group.low, group.high,
                                         [&](int64_t at, uint64_t, uint64_t over, uint64_t inside, const auto* key)
                                             __attribute__((always_inline)) {
                                               store_word(source.kept, at / kWord, over);
                                               above += std::popcount(over);
                                               for (; inside; inside &= inside - 1) {
                                                 const int i = std::countr_zero(inside);
                                                 stage.key[count] = key[i];
                                                 stage.place[count] = uint16_t(at - piece.begin + i);
                                                 ++count;
                                               }
                                               return count <= most;
                                             });
  if (!whole) return false;
  piece.above = above;
  piece.key.assign(stage.key.get(), stage.key.get() + count);
  piece.place.assign(stage.place.get(), stage.place.get() + count);
  return true;
}

template <class scalar_t>
ZF_INLINE void count_ties(Piece& piece, int64_t threshold) {
  int64_t ties = 0;
  each_word<scalar_t>(piece, threshold, threshold + 1,
                      [&](int64_t, uint64_t, uint64_t, uint64_t equal, const auto*) __attribute__((always_inline)) {
                        ties += std::popcount(equal);
                        return true;
                      });
  piece.ties = ties;
}

template <class scalar_t>
ZF_INLINE void write(Piece& piece, int64_t threshold) {
  int64_t skip = piece.skip;
  const Source& source = *piece.source;
  each_word<scalar_t>(piece, threshold, threshold + 1,
                      [&](int64_t at, uint64_t, uint64_t over, uint64_t equal, const auto*)
                          __attribute__((always_inline)) {
                            for (; skip > 0 && equal; --skip) equal &= equal - 1;
                            store_word(source.kept, at / kWord, over | equal);
                            return true;
                          });
}

// Counts the digit at `shift` of the survivors whose digits before it are `prefix`.
template <class scalar_t>
ZF_INLINE void count_digit(const Piece& piece, int shift, int width, int64_t prefix, int64_t* bin) {
  const Source& source = *piece.source;
  for (int64_t at = piece.begin; at < piece.end; at += kWord)
    for (uint64_t alive = alive_word(source, at); alive; alive &= alive - 1) {
      const int64_t key = key_at<scalar_t>(source.data, at + std::countr_zero(alive));
      if (key >> shift >> width == prefix) ++bin[key >> shift & ((int64_t(1) << width) - 1)];
    }
}

// One function for each pass, built for each width of vectors; what they call is inlined into them.
#define ZF_EACH_DTYPE(dtype, call) \
  switch (dtype) {                 \
    case DType::f64:               \
      return call(double);         \
    case DType::f16:               \
      return call(Half);           \
    case DType::bf16:              \
      return call(BFloat16);       \
    default:                       \
      return call(float);          \
  }
#define ZF_CALL(scalar_t) collect<scalar_t>(piece, group, stage)
ZF_MULTIVERSION bool run_collect(Piece& piece, const Group& group, Stage& stage){ZF_EACH_DTYPE(group.dtype, ZF_CALL)}
#undef ZF_CALL
#define ZF_CALL(scalar_t) count_ties<scalar_t>(piece, group.threshold)
ZF_MULTIVERSION void run_count_ties(Piece& piece, const Group& group){ZF_EACH_DTYPE(group.dtype, ZF_CALL)}
#undef ZF_CALL
#define ZF_CALL(scalar_t) write<scalar_t>(piece, group.threshold)
ZF_MULTIVERSION void run_write(Piece& piece, const Group& group){ZF_EACH_DTYPE(group.dtype, ZF_CALL)}
#undef ZF_CALL
#define ZF_CALL(scalar_t) count_digit<scalar_t>(piece, shift, width, prefix, bin)
void run_count_digit(const Piece& piece, DType dtype, int shift, int width, int64_t prefix,
                     int64_t* bin){ZF_EACH_DTYPE(dtype, ZF_CALL)}
#undef ZF_CALL
#define ZF_CALL(scalar_t) int64_t(key_at<scalar_t>(source.data, at))
int64_t key_of(DType dtype, const Source& source, int64_t at){ZF_EACH_DTYPE(dtype, ZF_CALL)}
#undef ZF_CALL
#define ZF_CALL(scalar_t) int64_t(rule::Magnitude<scalar_t>::kNan)
int64_t highest(DType dtype){ZF_EACH_DTYPE(dtype, ZF_CALL)}
#undef ZF_CALL
#define ZF_CALL(scalar_t) rule::Magnitude<scalar_t>::kBits
int digits(DType dtype){ZF_EACH_DTYPE(dtype, ZF_CALL)}
#undef ZF_CALL

ZF_MULTIVERSION int64_t count_alive(const Source& source, int64_t begin, int64_t end) {
  int64_t alive = 0;
  for (int64_t at = begin; at < end; at += kWord) alive += std::popcount(alive_word(source, at));
  return alive;
}

// Grows as n^(2/3): so the cost of ranking the sample and that of collecting what it leaves open stay in balance.
int64_t sample_size(int64_t size) {
  return std::clamp(int64_t(std::pow(double(size), 2. / 3) / 3), int64_t(4096), int64_t(1) << 18);
}

// Rule 1: if low <= the key of rank k < high, the bracket finds it; else digits do. Nothing else depends on the sample.
void bracket(Group& g, const std::vector<Source>& source) {
  g.low = 0, g.high = highest(g.dtype) + 1;
  if (g.k == 0) g.high = 0;
  if (g.k == g.survivors) g.low = g.high;
  if (g.low == g.high || g.survivors <= kSmall || g.survivors <= g.size / 64) return;
  const int64_t wanted = sample_size(g.size);
  const double step = double(g.size) / double(wanted);
  std::vector<int64_t> key;
  key.reserve(size_t(wanted));
  // Steps of one length, each place off by another part of its step, so that no row length meets always one column.
  size_t s = g.source_first;
  int64_t offset = 0;  // elements before source s
  uint32_t off = 0;
  for (int64_t i = 0; i < wanted; ++i) {
    off += 2654435769u;  // 2^32 / the golden ratio: fills the step evenly
    int64_t at = std::min(g.size - 1, int64_t((double(i) + off * 0x1p-32) * step));
    for (; at - offset >= source[s].size; ++s) offset += source[s].size;
    at -= offset;
    if (source[s].mask && !(source[s].mask[at >> 3] >> (at & 7) & 1)) continue;
    key.push_back(key_of(g.dtype, source[s], at));
  }
  const auto count = int64_t(key.size());
  g.sampled = true;
  if (count < kThin) {
    g.by_digits = true;
    return;
  }
  const double p = double(g.k) / double(g.survivors), n = double(count);
  const double apart = kSigmas * std::sqrt(n * p * (1 - p)) + 8;
  const auto left = int64_t(std::floor(p * n - apart)), right = int64_t(std::ceil(p * n + apart));
  auto end = key.end();
  if (right < count) {
    end = key.begin() + right;
    std::nth_element(key.begin(), end, key.end());
    g.high = *end + 1;
  }
  if (left >= 0) {
    std::nth_element(key.begin(), key.begin() + left, end);
    g.low = key[size_t(left)];
  }
}

// The key of rank k among what was collected; false if it is not there.
bool select(Group& g, const std::vector<Piece>& pieces) {
  int64_t inside = 0, above = 0;
  for (size_t p = g.first; p < g.last; ++p) inside += int64_t(pieces[p].key.size()), above += pieces[p].above;
  const int64_t below = g.survivors - above - inside;
  int64_t rank = g.k - below;  // from 1
  if (rank < 1 || rank > inside) return false;
  // Bins as wide as a power of two, so that few remain to be ordered.
  int shift = 0;
  while ((g.high - 1 - g.low) >> shift >= kBins) ++shift;
  std::vector<int64_t> bin(kBins, 0), few;
  for (size_t p = g.first; p < g.last; ++p)
    for (const int64_t key : pieces[p].key) ++bin[size_t((key - g.low) >> shift)];
  int64_t b = 0;
  for (; rank > bin[size_t(b)]; ++b) rank -= bin[size_t(b)];
  few.reserve(size_t(bin[size_t(b)]));
  for (size_t p = g.first; p < g.last; ++p)
    for (const int64_t key : pieces[p].key)
      if ((key - g.low) >> shift == b) few.push_back(key);
  std::nth_element(few.begin(), few.begin() + (rank - 1), few.end());
  g.threshold = few[size_t(rank - 1)];
  g.equal = std::count(few.begin(), few.end(), g.threshold);
  g.ties = rank - std::count_if(few.begin(), few.end(), [&](int64_t key) { return key < g.threshold; });
  return true;
}

// The same by counting digits, from the highest: exact for any data.
void select_by_digits(Group& g, const std::vector<Piece>& pieces) {
  int64_t prefix = 0, rank = g.k;
  const int bits = digits(g.dtype);
  std::mutex mutex;
  for (int pass = 0, top = bits; pass < rule::threshold_passes(bits); ++pass) {
    const int shift = rule::threshold_shift(bits, pass), width = top - shift;
    std::vector<int64_t> bin(size_t(1) << width, 0);
    torch::stable::parallel_for(int64_t(g.first), int64_t(g.last), 4, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> own(bin.size(), 0);
      for (int64_t p = begin; p < end; ++p)
        run_count_digit(pieces[size_t(p)], g.dtype, shift, width, prefix, own.data());
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t b = 0; b < bin.size(); ++b) bin[b] += own[b];
    });
    int64_t b = 0;
    for (; rank > bin[size_t(b)]; ++b) rank -= bin[size_t(b)];
    g.equal = bin[size_t(b)];
    prefix = prefix << width | b;
    top = shift;
  }
  g.threshold = prefix;
  g.ties = rank;
}

// How many of the equal ones go in each piece: the first ones of all.
void share_ties(const Group& g, std::vector<Piece>& pieces) {
  int64_t left = g.ties;
  for (size_t p = g.first; p < g.last; ++p) {
    pieces[p].skip = std::min(left, pieces[p].ties);
    left -= pieces[p].skip;
  }
}

void patch(Piece& piece, const Group& g) {
  uint8_t* kept = piece.source->kept;
  int64_t skip = g.ties == g.equal ? kFinite : piece.skip, seen = 0;
  for (size_t e = 0; e < piece.key.size(); ++e) {
    const int64_t key = piece.key[e], at = piece.begin + piece.place[e];
    const bool equal = key == g.threshold, stays = key > g.threshold || (equal && seen >= skip);
    seen += equal;
    kept[at >> 3] = uint8_t(kept[at >> 3] | uint8_t(stays) << (at & 7));
  }
}

template <class F>
void over_pieces(std::vector<Piece>& pieces, F&& f) {
  torch::stable::parallel_for(0, int64_t(pieces.size()), 2, [&](int64_t begin, int64_t end) { f(begin, end); });
}

void run(std::vector<Group>& groups, const std::vector<Source>& source, std::vector<Piece>& pieces) {
  over_pieces(pieces, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Piece& piece = pieces[size_t(p)];
      piece.alive = count_alive(*piece.source, piece.begin, piece.end);
    }
  });
  for (const Piece& piece : pieces) groups[size_t(piece.group)].survivors += piece.alive;
  for (Group& g : groups) g.k = std::min(g.drop, g.survivors);
  const auto count = int64_t(groups.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) bracket(groups[size_t(g)], source);
  });
  std::vector<std::atomic<bool>> crowded(groups.size());
  over_pieces(pieces, [&](int64_t begin, int64_t end) {
    Stage stage;
    for (int64_t p = begin; p < end; ++p) {
      Piece& piece = pieces[size_t(p)];
      const Group& g = groups[size_t(piece.group)];
      std::atomic<bool>& full = crowded[size_t(piece.group)];
      if (g.by_digits || full.load(std::memory_order_relaxed)) continue;
      if (!run_collect(piece, g, stage)) full.store(true, std::memory_order_relaxed);
    }
  });
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Group& g = groups[size_t(i)];
      if (g.low == g.high) continue;  // nothing or everything goes
      g.by_digits = g.by_digits || crowded[size_t(i)] || !select(g, pieces);
      if (g.by_digits || g.ties == g.equal) continue;
      for (size_t p = g.first; p < g.last; ++p)
        pieces[p].ties = std::count(pieces[p].key.begin(), pieces[p].key.end(), g.threshold);
      share_ties(g, pieces);
    }
  });
  bool rest = false;
  for (Group& g : groups) {
    if (!g.by_digits) continue;
    rest = true;
    select_by_digits(g, pieces);
  }
  auto again = [&](auto&& f) {
    over_pieces(pieces, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const Group& g = groups[size_t(pieces[size_t(p)].group)];
        f(pieces[size_t(p)], g);
      }
    });
  };
  if (rest) {
    again([](Piece& piece, const Group& g) {
      if (g.by_digits && g.ties < g.equal) run_count_ties(piece, g);
    });
    for (const Group& g : groups) {
      if (!g.by_digits) continue;
      if (g.ties == g.equal)
        for (size_t p = g.first; p < g.last; ++p) pieces[p].skip = kFinite;
      else
        share_ties(g, pieces);
    }
  }
  again([](Piece& piece, const Group& g) {
    if (g.by_digits)
      run_write(piece, g);
    else
      patch(piece, g);
  });
}

std::tuple<std::vector<Tensor>, Tensor> threshold_cpu(const std::vector<Tensor>& score, const std::vector<Tensor>& mask,
                                                      const std::vector<int64_t>& drop,
                                                      const std::vector<int64_t>& group) {
  const size_t count = score.size();
  STD_TORCH_CHECK(count > 0 && group.size() == count && (mask.empty() || mask.size() == count),
                  "threshold: malformed lists");
  std::vector<Group> groups(drop.size());
  std::vector<Tensor> input, kept;
  std::vector<Source> source;  // group after group
  std::vector<Piece> pieces;
  for (size_t j = 0; j < count; ++j) {
    STD_TORCH_CHECK(group[j] >= 0 && size_t(group[j]) < drop.size(), "threshold: malformed 'group'");
    kept.push_back(torch::stable::new_empty(score[j], {64 * ((score[j].numel() + 511) / 512)}, ScalarType::Byte));
  }
  std::vector<size_t> order(count);
  for (size_t j = 0; j < count; ++j) order[j] = j;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return group[a] < group[b]; });
  for (const size_t j : order) {
    Group& g = groups[size_t(group[j])];
    const DType dtype = dtype_of("threshold", score[j]);
    if (g.source_first == g.source_last) g.source_first = g.source_last = source.size();
    STD_TORCH_CHECK(g.source_first == g.source_last || dtype == g.dtype, "threshold: mixed dtypes in a group");
    ++g.source_last;
    g.dtype = dtype;
    g.size += score[j].numel();
    Source s{nullptr, nullptr, kept[j].mutable_data_ptr<uint8_t>(), score[j].numel(), int64_t(j)};
    input.push_back(as_contiguous(score[j]));
    s.data = input.back().const_data_ptr();
    if (!mask.empty()) {
      STD_TORCH_CHECK(mask[j].scalar_type() == ScalarType::Byte && mask[j].numel() == kept[j].numel(),
                      "threshold: malformed 'mask'");
      input.push_back(as_contiguous(mask[j]));
      s.mask = input.back().const_data_ptr<uint8_t>();
    }
    const int64_t words = (s.size + kWord - 1) / kWord;
    std::fill(s.kept + 8 * words, s.kept + kept[j].numel(), uint8_t(0));
    source.push_back(s);
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    groups[g].drop = drop[g];
    groups[g].first = pieces.size();
    for (size_t s = groups[g].source_first; s < groups[g].source_last; ++s)
      for (int64_t at = 0; at < source[s].size; at += kPiece) {
        Piece piece{};
        piece.source = &source[s], piece.group = int64_t(g);
        piece.begin = at, piece.end = std::min(at + kPiece, source[s].size);
        pieces.push_back(std::move(piece));
      }
    groups[g].last = pieces.size();
  }
  run(groups, source, pieces);
  Tensor status = torch::stable::new_empty(score[0], {int64_t(count + groups.size())}, ScalarType::Long);
  int64_t* note = status.mutable_data_ptr<int64_t>();
  std::fill(note, note + count, kFinite);
  for (const Piece& piece : pieces)
    if (piece.nan >= 0) note[piece.source->tensor] = std::min(note[piece.source->tensor], piece.nan);
  for (size_t g = 0; g < groups.size(); ++g) note[count + g] = groups[g].survivors;
  return {std::move(kept), status};
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("threshold", TORCH_BOX(&zipfast::threshold_cpu)); }
