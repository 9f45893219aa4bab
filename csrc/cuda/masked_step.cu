// SPDX-License-Identifier: Apache-2.0
// masked_step_ on a GPU: a step of SGD, Adam or AdamW and the mask of weights and state, one launch for many tensors
// (Frankle & Carbin 2019, section 2).
//
// A block owns kSoupPiece elements of one tensor, a thread eight of them at a time: a byte of the mask.  Where that
// byte is 0, nothing is read and zeros are written.  The formula is that of rule.h; this file is compiled without
// further contraction, so that the bits are those of the C++ kernel.  Bandwidth-bound.
#include "cuda/launch.h"
#include "cuda/mask.cuh"

namespace zipfast::cuda {

namespace {

template <rule::StepKind kKind, class scalar_t, class state_t, class acc_t>
__device__ inline void step_piece(const StepTensor& t, const rule::StepRule<acc_t>& r, int flags, long long begin,
                                  long long end) {
  scalar_t* param = static_cast<scalar_t*>(t.param);
  const scalar_t* grad = static_cast<const scalar_t*>(t.grad);
  state_t* moment = static_cast<state_t*>(t.moment);
  state_t* square = static_cast<state_t*>(t.square);
  for (long long at = begin + (long long)threadIdx.x * kMaskByte; at < end; at += (long long)blockDim.x * kMaskByte) {
    const unsigned byte = mask_byte(t.mask, at);
    const int n = end - at < kMaskByte ? int(end - at) : kMaskByte;
    const bool whole = t.aligned && n == kMaskByte;
    scalar_t w[kMaskByte] = {}, g[kMaskByte] = {};
    state_t m[kMaskByte] = {}, v[kMaskByte] = {};
    if (byte != 0) {
      load_eight(param + at, n, whole, w);
      load_eight(grad + at, n, whole, g);
      if constexpr (kKind != rule::kStepPlain) load_eight(moment + at, n, whole, m);
      if constexpr (kKind == rule::kStepAdam) load_eight(square + at, n, whole, v);
      ZF_UNROLL
      for (int e = 0; e < kMaskByte; ++e) {
        acc_t weight = acc_t(widen(w[e])), one = acc_t(widen(m[e])), two = acc_t(widen(v[e]));
        rule::step_weight<kKind>(r, flags, weight, acc_t(widen(g[e])), one, two);
        const bool alive = (byte >> e) & 1;
        w[e] = alive ? narrow<scalar_t>(double(weight)) : scalar_t{};
        m[e] = alive ? narrow<state_t>(double(one)) : state_t{};
        v[e] = alive ? narrow<state_t>(double(two)) : state_t{};
      }
    }
    store_eight(param + at, n, whole, w);
    if constexpr (kKind != rule::kStepPlain) store_eight(moment + at, n, whole, m);
    if constexpr (kKind == rule::kStepAdam) store_eight(square + at, n, whole, v);
  }
}

}  // namespace

template <rule::StepKind kKind>
__global__ void masked_step_kernel(const __grid_constant__ StepJob job) {
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
