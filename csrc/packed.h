// SPDX-License-Identifier: Apache-2.0
// Packed masks as ops take them: 64 * ceil(n / 512) bytes for n weights in flat order, one bit each, lowest bit first,
// 1 = alive.  A mask without elements, or an empty list of masks, says that all are alive.
#pragma once
#include "stable.h"

namespace zipfast {

// The bits of tensor j of `size` elements; null: all alive.
inline const uint8_t* mask_bits(const char* op, const std::vector<Tensor>& mask, size_t j, int64_t size) {
  if (mask.empty() || mask[j].numel() == 0) return nullptr;
  STD_TORCH_CHECK(mask[j].scalar_type() == ScalarType::Byte && mask[j].is_contiguous() &&
                      mask[j].numel() == (size + 511) / 512 * 64,
                  op, ": malformed 'mask'");
  return mask[j].const_data_ptr<uint8_t>();
}

}  // namespace zipfast
