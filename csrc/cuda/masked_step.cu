// SPDX-License-Identifier: Apache-2.0
// masked_step_ on a GPU: a step of SGD, Adam or AdamW and the mask of weights and state, one launch for many tensors
// (Frankle & Carbin 2019, section 2).
//
// A block owns kSoupPiece elements of one tensor, a thread groups of them: 16 bytes of weights or of state, whichever
// are wider.  Where the bits of a group are 0, nothing of it is read and zeros are written; two groups are in flight.
// The formula is that of rule.h; this file is compiled without further contraction, so that the bits are those of the
// C++ kernel.  Bandwidth-bound.
#include "cuda/mask.cuh"

namespace zipfast::cuda {

namespace {

// kWhole: the piece is full, all of it aligned.
template <rule::StepKind kKind, bool kWhole, class scalar_t, class state_t, class acc_t>
__device__ inline void step_groups(const StepTensor& t, const rule::StepRule<acc_t>& r, int flags, long long begin,
                                   long long end) {
  constexpr int kCount = sizeof(state_t) > sizeof(scalar_t) ? kGroup<state_t> : kGroup<scalar_t>;
  constexpr int kGroups = kSoupEach / kCount, kTogether = kWhole ? 2 : 1;
  scalar_t* param = static_cast<scalar_t*>(t.param);
  const scalar_t* grad = static_cast<const scalar_t*>(t.grad);
  state_t* moment = static_cast<state_t*>(t.moment);
  state_t* square = static_cast<state_t*>(t.square);
  const unsigned mask = mask_of_thread<kCount>(t.mask, begin, end);
  for (int first = 0; first < kGroups; first += kTogether) {
    scalar_t w[kTogether][kCount] = {}, g[kTogether][kCount] = {};
    state_t m[kTogether][kCount] = {}, v[kTogether][kCount] = {};
    ZF_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const long long at = begin + (long long)((first + u) * kSoupThreads + int(threadIdx.x)) * kCount, left = end - at;
      const unsigned alive = mask >> (first + u) * kCount & ((1u << kCount) - 1);
      if ((!kWhole && left <= 0) || alive == 0) continue;
      const int n = !kWhole && left < kCount ? int(left) : kCount;
      const bool whole = kWhole || (t.aligned && n == kCount);
      load_group<kCount>(param + at, n, whole, w[u]);
      load_group<kCount>(grad + at, n, whole, g[u]);
      if constexpr (kKind != rule::kStepPlain) load_group<kCount>(moment + at, n, whole, m[u]);
      if constexpr (kKind == rule::kStepAdam) load_group<kCount>(square + at, n, whole, v[u]);
    }
    ZF_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const long long at = begin + (long long)((first + u) * kSoupThreads + int(threadIdx.x)) * kCount, left = end - at;
      const unsigned alive = mask >> (first + u) * kCount & ((1u << kCount) - 1);
      if (!kWhole && left <= 0) continue;
      if (alive != 0) {
        ZF_UNROLL
        for (int e = 0; e < kCount; ++e) {
          acc_t weight = acc_t(widen(w[u][e])), one = acc_t(widen(m[u][e])), two = acc_t(widen(v[u][e]));
          rule::step_weight<kKind>(r, flags, weight, acc_t(widen(g[u][e])), one, two);
          const bool lives = alive >> e & 1;
          w[u][e] = lives ? narrow<scalar_t>(double(weight)) : scalar_t{};
          m[u][e] = lives ? narrow<state_t>(double(one)) : state_t{};
          v[u][e] = lives ? narrow<state_t>(double(two)) : state_t{};
        }
      }
      const int n = !kWhole && left < kCount ? int(left) : kCount;
      const bool whole = kWhole || (t.aligned && n == kCount);
      store_group<kCount>(param + at, n, whole, w[u]);
      if constexpr (kKind != rule::kStepPlain) store_group<kCount>(moment + at, n, whole, m[u]);
      if constexpr (kKind == rule::kStepAdam) store_group<kCount>(square + at, n, whole, v[u]);
    }
  }
}

template <rule::StepKind kKind, class scalar_t, class state_t, class acc_t>
__device__ inline void step_piece(const StepTensor& t, const rule::StepRule<acc_t>& r, int flags, long long begin,
                                  long long end) {
  if (t.aligned && end - begin == kSoupPiece)
    step_groups<kKind, true, scalar_t, state_t>(t, r, flags, begin, end);
  else
    step_groups<kKind, false, scalar_t, state_t>(t, r, flags, begin, end);
}

}  // namespace

template <rule::StepKind kKind>
__global__ void __launch_bounds__(kSoupThreads, 3) masked_step_kernel(const __grid_constant__ StepJob job) {
  const SoupPlace place = soup_place(job, blockIdx.x);
  const StepTensor& t = job.tensor[place.tensor];
  const bool half_state = DType(t.state) != DType::f32;
  switch (DType(t.dtype)) {
    case DType::f64:
      return step_piece<kKind, double, double>(t, job.wide, job.flags, place.begin, place.end);
    case DType::f16:
      if (half_state) return step_piece<kKind, Half, Half>(t, job.single, job.flags, place.begin, place.end);
      return step_piece<kKind, Half, float>(t, job.single, job.flags, place.begin, place.end);
    case DType::bf16:
      if (half_state) return step_piece<kKind, BFloat16, BFloat16>(t, job.single, job.flags, place.begin, place.end);
      return step_piece<kKind, BFloat16, float>(t, job.single, job.flags, place.begin, place.end);
    default:
      return step_piece<kKind, float, float>(t, job.single, job.flags, place.begin, place.end);
  }
}

cudaError_t masked_step(const StepJob& job, cudaStream_t stream) {
  if (job.blocks == 0) return cudaSuccess;
  const unsigned blocks = unsigned(job.blocks), threads = unsigned(kSoupThreads);
  if (job.kind == rule::kStepAdam)
    ZF_LAUNCH((masked_step_kernel<rule::kStepAdam>), blocks, threads, 0, stream, job);
  else if (job.kind == rule::kStepMomentum)
    ZF_LAUNCH((masked_step_kernel<rule::kStepMomentum>), blocks, threads, 0, stream, job);
  else
    ZF_LAUNCH((masked_step_kernel<rule::kStepPlain>), blocks, threads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
