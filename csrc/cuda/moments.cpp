// SPDX-License-Identifier: Apache-2.0
// Glue of moments_' CUDA kernels: fills launches of up to kMomentsSpaces spaces of one dtype.
#include <atomic>
#include <string>

#include "cuda/moments_packed_glue.h"
#include "cuda/scope.h"

namespace zipfast {
namespace {

using cuda::MomentsPath;

// What the current device has code for; asked once a device, as every call would otherwise.
cuda::MomentsCode code_here(const CudaScope& scope) {
#ifdef ZF_EMU
  return cuda::moments_code(scope.capability());
#else
  constexpr int kKnown = 64, kAsked = 4;
  static std::atomic<int> known[kKnown];
  int device = 0;
  const bool listed = cudaGetDevice(&device) == cudaSuccess && device < kKnown;
  int bits = listed ? known[device].load(std::memory_order_relaxed) : 0;
  if (!bits) {
    const cuda::MomentsCode code = cuda::moments_code(scope.capability());
    bits = kAsked | (code.mma ? 1 : 0) | (code.wgmma ? 2 : 0);
    if (listed) known[device].store(bits, std::memory_order_relaxed);
  }
  return {(bits & 1) != 0, (bits & 2) != 0};
#endif
}

// The path that was asked for, or what "auto" takes; refuses what cannot run here.
MomentsPath path_of(const std::string& asked, cuda::MomentsCode code, DType dtype, int models, int64_t features,
                    int64_t samples) {
  const bool packs = models <= cuda::kPackedPointers;
  if (asked == "auto") return cuda::moments_path({code.mma, code.wgmma && packs}, dtype, features, samples);
  if (asked == "generic") return MomentsPath::generic;
  STD_TORCH_CHECK(asked == "mma" || asked == "wgmma", "moments_: path '", asked, "' is not known");
  const bool wgmma = asked == "wgmma";
  STD_TORCH_CHECK(dtype != DType::f64, "moments_: path '", asked,
                  "' takes features of float32, float16 or bfloat16, got float64");
  STD_TORCH_CHECK(wgmma || samples <= cuda::kMmaMostSamples, "moments_: path '", asked, "' takes at most ",
                  cuda::kMmaMostSamples, " samples in one call, got ", samples);
  STD_TORCH_CHECK(!wgmma || packs, "moments_: path '", asked, "' takes at most ", cuda::kPackedPointers,
                  " models, got ", models);
#ifndef ZF_EMU
  STD_TORCH_CHECK(wgmma ? code.wgmma : code.mma, "moments_: path '", asked, "' needs a GPU of compute capability ",
                  wgmma ? "9.0" : "8.0 or newer", " and a build with code for it");
#endif
  return wgmma ? MomentsPath::wgmma : MomentsPath::mma;
}

void moments_cuda(const std::vector<Tensor>& comoment, const std::vector<Tensor>& total, const std::vector<Tensor>& bad,
                  const std::vector<Tensor>& features, const std::vector<Tensor>& shift,
                  const std::vector<int64_t>& axis, const std::vector<int64_t>& seen, std::string path) {
  const size_t spaces = comoment.size();
  STD_TORCH_CHECK(spaces && total.size() == spaces && bad.size() == spaces && shift.size() == spaces &&
                      axis.size() == spaces && seen.size() == spaces && features.size() % spaces == 0,
                  "moments_: malformed lists");
  const int models = int(features.size() / spaces);
  STD_TORCH_CHECK(models <= cuda::kMomentsPointers, "moments_: at most ", cuda::kMomentsPointers, " models, got ",
                  models);
  CudaScope scope(features[0]);
  const cuda::MomentsCode code = code_here(scope);

  std::vector<Tensor> alive;  // contiguous copies, if any, until the launch
  PackedWaves packed(models, total[0], scope.stream);
  cuda::MomentsJob job{};
  for (size_t i = 0; i < spaces; ++i)  // before anything is added
    (void)path_of(path, code, dtype_of("moments_", features[i * models]), models, 0, 0);
  DType dtype{};
  MomentsPath taken{};
  int64_t partial = 0;
  auto flush = [&] {
    if (job.spaces == 0) return;
    if (partial) {
      Tensor scratch = torch::stable::new_empty(total[0], {partial});
      job.partial = scratch.mutable_data_ptr<double>();
      check_launch("moments_", cuda::moments(dtype, taken, job, scope.stream));
    } else {
      check_launch("moments_", cuda::moments(dtype, taken, job, scope.stream));
    }
    job = {};
    partial = 0;
  };
  for (size_t i = 0; i < spaces; ++i) {
    const Tensor& first = features[i * models];
    const DType t = dtype_of("moments_", first);
    const AxisView view(first, axis[i]);
    const int64_t F = models * view.size, side = cuda::moments_side(F);
    const MomentsPath best = path_of(path, code, t, models, F, view.outer * view.inner);
    const bool full = job.spaces == cuda::kMomentsSpaces || (job.spaces + 1) * models > cuda::kMomentsPointers;
    if (best != MomentsPath::wgmma) {
      if (full || t != dtype || best != taken) flush();
      dtype = t, taken = best;
    } else if (full) {
      flush();  // its pointers pass through the same places
    }
    alive.push_back(as_contiguous(shift[i]));
    STD_TORCH_CHECK(comoment[i].numel() == F * F && comoment[i].is_contiguous() && total[i].numel() == F &&
                        total[i].is_contiguous() && bad[i].numel() == models && bad[i].is_contiguous() &&
                        alive.back().numel() == F,
                    "moments_: malformed accumulators");
    cuda::MomentsSpace& s = job.space[job.spaces];
    s.outer = view.outer, s.size = view.size, s.inner = view.inner, s.seen = seen[i];
    if (s.outer * s.size * s.inner == 0) continue;
    s.shift = alive.back().const_data_ptr<double>();
    s.comoment = comoment[i].mutable_data_ptr<double>();
    s.total = total[i].mutable_data_ptr<double>();
    s.bad = reinterpret_cast<long long*>(bad[i].mutable_data_ptr<int64_t>());
    s.pointer = job.spaces * models;
    for (int m = 0; m < models; ++m) {
      const Tensor& x = features[i * models + m];
      STD_TORCH_CHECK(x.numel() == first.numel() && x.scalar_type() == first.scalar_type(),
                      "moments_: malformed features");
      alive.push_back(as_contiguous(x));
      job.x[s.pointer + m] = alive.back().const_data_ptr();
    }
    if (best == MomentsPath::wgmma) {
      cuda::PackedSpace own{};
      own.outer = s.outer, own.size = s.size, own.inner = s.inner, own.seen = s.seen;
      own.shift = s.shift, own.comoment = s.comoment, own.total = s.total, own.bad = s.bad;
      packed.add(t, own, job.x + s.pointer);
      continue;
    }
    const int64_t tiles = rule::triangle_tiles(side);
    s.tiles = int(tiles);
    s.splits = cuda::moments_splits(taken, tiles, s.outer * s.inner);
    s.block = job.blocks;
    s.reduce = job.reduce_blocks;
    s.partial = partial;
    STD_TORCH_CHECK(job.blocks + tiles * s.splits < (int64_t(1) << 31), "moments_: too many features");
    job.blocks += s.tiles * s.splits;
    if (s.splits > 1) {
      partial += tiles * s.splits * cuda::moments_partial(taken);
      job.reduce_blocks += s.tiles * cuda::kMomentsReduce;
    }
    job.models = models;
    ++job.spaces;
  }
  flush();
  packed.flush();
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("moments_", TORCH_BOX(&zipfast::moments_cuda)); }
