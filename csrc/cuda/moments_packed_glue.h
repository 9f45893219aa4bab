// SPDX-License-Identifier: Apache-2.0
// Glue of moments_' "wgmma" path: gathers slabs of spaces into waves and brings the memory they need.
#pragma once
#include "cuda/scope.h"

namespace zipfast {

// One space at a time is added; a wave is launched when it is full, and at the end.
class PackedWaves {
 public:
  // `beside`: a float64 tensor of the device at hand; it must outlive this.
  PackedWaves(int models, const Tensor& beside, cudaStream_t stream) : beside_(beside), stream_(stream) {
    job_.models = models;
  }

  // `x`: the features of all models, contiguous; everything must stay alive until flush().
  void add(DType dtype, cuda::PackedSpace s, const void* const* x) {
    const int64_t features = job_.models * s.size, samples = s.outer * s.inner;
    const int64_t groups = (samples + cuda::kPackedGroup - 1) / cuda::kPackedGroup;
    const int64_t slab = cuda::packed_slab(features, groups);
    s.vector = s.inner % 8 == 0 ? 8 : s.inner % 4 == 0 ? 4 : 1;
    const size_t width = dtype == DType::f32 ? 4 : 2;
    for (int m = 0; m < job_.models; ++m)
      while (s.vector > 1 && reinterpret_cast<uintptr_t>(x[m]) % std::min<size_t>(16, width * s.vector)) s.vector /= 2;
    if (s.vector == 2) s.vector = 1;
    for (int64_t g = 0; g < groups; g += slab) {
      s.groups = int(std::min(slab, groups - g));
      s.plan = cuda::packed_plan(features, s.groups);
      const int64_t bytes = s.plan.padded * cuda::kPackedGroup * 4 * s.groups;
      // Slabs of one space follow each other: they add to the same co-moment.
      if (g > 0 || dtype != dtype_ || job_.spaces == cuda::kPackedSpaces || image_ + bytes > cuda::kPackedBytes ||
          (job_.spaces + 1) * job_.models > cuda::kPackedPointers)
        flush();
      dtype_ = dtype;
      s.begin = g * cuda::kPackedGroup;
      s.end = std::min(samples, (g + s.groups) * cuda::kPackedGroup);
      s.pointer = job_.spaces * job_.models;
      std::copy(x, x + job_.models, job_.x + s.pointer);
      s.pack = job_.pack_blocks, s.item = job_.items, s.sum = job_.sum_blocks;
      s.image = image_, s.scale = scale_, s.rows = rows_, s.partial = partial_;
      const int64_t split = s.plan.splits > 1 ? s.plan.rest() : 0;
      const int64_t blocks = s.plan.padded / cuda::kPackedRows * s.groups;
      STD_TORCH_CHECK(features < (int64_t(1) << 31) && job_.pack_blocks + blocks < (int64_t(1) << 31),
                      "moments_: too many features");
      job_.pack_blocks += int(blocks);
      job_.items += s.plan.items();
      job_.sum_blocks += int(split * 2 * 16 + (features + 31) / 32);
      image_ += bytes;
      scale_ += s.groups * s.plan.padded;
      rows_ += s.groups * features;
      partial_ += split * s.plan.splits * 2 * cuda::kPackedTile * cuda::kPackedTile;
      job_.space[job_.spaces++] = s;
    }
  }

  void flush() {
    if (job_.spaces == 0) return;
    // One piece of memory, in float64 numbers: operands, row sums, scales, partial tiles, flags.
    const int64_t image = image_ / 8, scale = (scale_ + 3) / 4 * 2, partial = partial_ / 2;
    Tensor memory = torch::stable::new_empty(beside_, {image + partial + scale + rows_ + cuda::kPackedSpaces / 2});
    double* at = memory.mutable_data_ptr<double>();
    job_.image = reinterpret_cast<unsigned char*>(at);
    job_.partial = reinterpret_cast<float*>(at += image);
    job_.scale = reinterpret_cast<float*>(at += partial);
    job_.rows = at += scale;
    job_.plain = reinterpret_cast<int*>(at + rows_);
    check_launch("moments_", cuda::moments_packed(dtype_, job_, stream_));
    const int models = job_.models;
    job_ = {};
    job_.models = models;
    image_ = scale_ = rows_ = partial_ = 0;
  }

 private:
  cuda::PackedJob job_{};
  const Tensor& beside_;
  cudaStream_t stream_;
  DType dtype_{};
  int64_t image_ = 0, scale_ = 0, rows_ = 0, partial_ = 0;
};

}  // namespace zipfast
