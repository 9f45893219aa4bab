// SPDX-License-Identifier: Apache-2.0
// apply_mask_ on a GPU: packed masks applied to lists of weights, or to what they are rewound to, in one launch
// (Frankle & Carbin 2019, section 2).
//
// A block owns kSoupPiece elements of one tensor, a thread eight of them at a time.  Values are moved as bits.  What is
// dead is not read; in place, what is alive as a whole byte of the mask is not touched.  Bandwidth-bound.
#include "cuda/launch.h"
#include "cuda/mask.cuh"

namespace zipfast::cuda {

namespace {

template <class bits_t>
__device__ inline void apply_piece(const ApplyTensor& t, long long begin, long long end) {
  bits_t* out = static_cast<bits_t*>(t.out);
  const bits_t* source = static_cast<const bits_t*>(t.source);
  for (long long at = begin + (long long)threadIdx.x * kMaskByte; at < end; at += (long long)blockDim.x * kMaskByte) {
    const unsigned byte = mask_byte(t.mask, at);
    if (byte == 0xffu && source == out) continue;
    const int n = end - at < kMaskByte ? int(end - at) : kMaskByte;
    const bool whole = t.aligned && n == kMaskByte;
    bits_t value[kMaskByte] = {};
    if (byte != 0) load_eight(source + at, n, whole, value);
    ZF_UNROLL
    for (int e = 0; e < kMaskByte; ++e) value[e] = (byte >> e) & 1 ? value[e] : bits_t(0);
    store_eight(out + at, n, whole, value);
  }
}

}  // namespace

__global__ void apply_mask_kernel(const __grid_constant__ ApplyJob job) {
  const SoupPlace place = soup_place(job, blockIdx.x);
  const ApplyTensor& t = job.tensor[place.tensor];
  if (t.width == 8)
    apply_piece<unsigned long long>(t, place.begin, place.end);
  else if (t.width == 4)
    apply_piece<uint32_t>(t, place.begin, place.end);
  else
    apply_piece<uint16_t>(t, place.begin, place.end);
}

cudaError_t apply_mask(const ApplyJob& job, cudaStream_t stream) {
  if (job.blocks == 0) return cudaSuccess;
  ZF_LAUNCH((apply_mask_kernel), unsigned(job.blocks), unsigned(kSoupThreads), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda
