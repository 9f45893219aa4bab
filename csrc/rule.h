// SPDX-License-Identifier: Apache-2.0
// One-step formulas, written once and used by C++ and CUDA alike: the two differ only in who runs them.
#pragma once
#include "dtype.h"

namespace zipfast::rule {

// --- zip_match
// -------------------------------------------------------------------------------------------------------- The models
// of a group are the low 31 bits of an int; the top bit says that the slot left the pool (its group was merged into
// another one, or alpha = 0 retired it).
constexpr int32_t kGone = INT32_MIN;

// Bits that forbid a partner to a slot: its own exhausted models, and having left the pool.
ZF_HD inline int32_t forbids(int32_t models, int32_t exhausted) { return (models & exhausted) | kGone; }

// Similarity of the merged group to a third one (Stoica et al. 2024, section 4.3).
template <class scalar_t>
ZF_HD inline scalar_t merged_similarity(scalar_t alpha, scalar_t a, scalar_t b) {
  return alpha * (b < a ? b : a);
}

// What the matcher reports per space; the columns of `status`.
enum Status { kLifted, kDeadlock, kNanAt, kAsymmetricAt, kStatusFields };

}  // namespace zipfast::rule
