// SPDX-License-Identifier: Apache-2.0
// apply_mask_ on the CPU: packed masks applied to lists of weights, or to what they are rewound to (Frankle & Carbin
// 2019, section 2).
//
// Work is cut into pieces of kPiece elements of one tensor, each owned by one thread.  Values are moved as bits, words
// of 32 weights at a time: in place, a word that is all alive is not touched; from a source, large calls write past the
// caches, so that `out` is never read.  Bandwidth-bound; the bits depend on nothing but the arguments.
#include <algorithm>

#include "cpu/mask.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace zipfast {
namespace {

constexpr int64_t kPiece = 65536;
constexpr int64_t kStreamBytes = 8 << 20;  // of a whole call: more than a core's share of the caches

struct Apply {
  void* out;
  const void* source;  // null: out itself
  const uint8_t* mask;
  int64_t size;
  int32_t width;  // bytes of an element
  bool stream;
};

template <class bits_t>
ZF_INLINE void select_word(bits_t* out, const bits_t* source, uint32_t word, int64_t n) {
#pragma omp simd
  for (int64_t e = 0; e < n; ++e) out[e] = (word >> e) & 1 ? source[e] : bits_t(0);
}

// 32 elements that are complete: a constant count makes whole vectors of them.
template <class bits_t>
ZF_INLINE void stream_word(bits_t* out, const bits_t* source, uint32_t word) {
#if defined(__SSE2__)
  alignas(64) bits_t block[kMaskWord];
  select_word(block, source, word, kMaskWord);
  constexpr int kParts = kMaskWord * sizeof(bits_t) / sizeof(__m128i);
  for (int i = 0; i < kParts; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out) + i, _mm_load_si128(reinterpret_cast<const __m128i*>(block) + i));
#else
  select_word(out, source, word, kMaskWord);
#endif
}

template <class bits_t>
ZF_INLINE void apply_piece(const Apply& a, int64_t begin, int64_t end) {
  bits_t* out = static_cast<bits_t*>(a.out);
  const bits_t* source = static_cast<const bits_t*>(a.source);
  int64_t at = begin;
  if (source == nullptr) {
    for (; at + kMaskWord <= end; at += kMaskWord) {
      const uint32_t word = mask_word(a.mask, at);
      if (word != kAllAlive) select_word(out + at, out + at, word, kMaskWord);
    }
    source = out;
  } else if (a.stream && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (; at + kMaskWord <= end; at += kMaskWord) stream_word(out + at, source + at, mask_word(a.mask, at));
#if defined(__SSE2__)
    _mm_sfence();
#endif
  } else {
    for (; at + kMaskWord <= end; at += kMaskWord) select_word(out + at, source + at, mask_word(a.mask, at), kMaskWord);
  }
  if (at < end) select_word(out + at, source + at, mask_word(a.mask, at), end - at);
}

ZF_MULTIVERSION void run_piece(const Apply& a, int64_t begin, int64_t end) {
  switch (a.width) {
    case 8:
      return apply_piece<uint64_t>(a, begin, end);
    case 4:
      return apply_piece<uint32_t>(a, begin, end);
    default:
      return apply_piece<uint16_t>(a, begin, end);
  }
}

void apply_mask_cpu(const std::vector<Tensor>& out, const std::vector<Tensor>& mask,
                    const std::vector<Tensor>& source) {
  const size_t count = out.size();
  STD_TORCH_CHECK((mask.empty() || mask.size() == count) && (source.empty() || source.size() == count),
                  "apply_mask_: malformed lists");
  std::vector<Tensor> keep;
  std::vector<Apply> apply;
  std::vector<std::pair<size_t, int64_t>> piece;  // tensor, first element
  int64_t bytes = 0;
  for (size_t j = 0; j < count; ++j) {
    STD_TORCH_CHECK(out[j].is_contiguous(), "apply_mask_: 'out' must be contiguous");
    const DType dtype = dtype_of("apply_mask_", out[j]);
    const int64_t size = out[j].numel();
    const int32_t width = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    const void* from = nullptr;
    if (!source.empty()) {
      STD_TORCH_CHECK(source[j].numel() == size && source[j].scalar_type() == out[j].scalar_type(),
                      "apply_mask_: malformed 'source'");
      keep.push_back(as_contiguous(source[j]));
      from = keep.back().const_data_ptr();
    }
    const uint8_t* bits = mask_bits("apply_mask_", mask, j, size);
    apply.push_back({out[j].mutable_data_ptr(), from, bits, size, width, false});
    bytes += size * width;
    if (bits != nullptr || from != nullptr)
      for (int64_t at = 0; at < size; at += kPiece) piece.emplace_back(j, at);
  }
  for (Apply& a : apply) a.stream = bytes >= kStreamBytes;
  torch::stable::parallel_for(0, int64_t(piece.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [j, at] = piece[size_t(p)];
      run_piece(apply[j], at, std::min(at + kPiece, apply[j].size));
    }
  });
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("apply_mask_", TORCH_BOX(&zipfast::apply_mask_cpu)); }
