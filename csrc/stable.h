// SPDX-License-Identifier: Apache-2.0
// The one door to PyTorch: its stable ABI (torch >= 2.10), nothing of ATen or c10.  A binary built against one torch
// therefore runs under every later one.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace zipfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The storage type of a tensor; anything but the four floating types is refused (Python has checked already: this
// guards memory only).
inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, float16 or bfloat16");
}

// A tensor seen as [outer, size, inner] around one axis.
struct AxisView {
  int64_t outer = 1, size = 1, inner = 1;
  AxisView() = default;
  AxisView(const Tensor& t, int64_t axis) {
    STD_TORCH_CHECK(axis >= 0 && axis < t.dim(), "axis out of range");
    for (int64_t d = 0; d < t.dim(); ++d) (d < axis ? outer : d == axis ? size : inner) *= t.size(d);
  }
};

}  // namespace zipfast
