// SPDX-License-Identifier: Apache-2.0
// apply_mask_ on a GPU: packed masks applied to lists of weights, or to what they are rewound to, in one launch
// (Frankle & Carbin 2019, section 2).
//
// A block owns kSoupPiece elements of one tensor, a thread groups of 16 bytes of them.  Values are moved as bits.
// Groups that are dead are not read; in place, those that are alive are not touched.  Bandwidth-bound.
#include "cuda/mask.cuh"

namespace zipfast::cuda {

namespace {

// kWhole: the piece is full, all of it aligned.
template <bool kWhole, class bits_t>
__device__ inline void apply_groups(const ApplyTensor& t, long long begin, long long end) {
  constexpr int kCount = kGroup<bits_t>, kGroups = kSoupEach / kCount, kTogether = kGroups < 4 ? kGroups : 4;
  constexpr unsigned kAll = (1u << kCount) - 1;
  bits_t* out = static_cast<bits_t*>(t.out);
  const bits_t* source = static_cast<const bits_t*>(t.source);
  const bool moves = source != out;
  const unsigned mask = mask_of_thread<kCount>(t.mask, begin, end);
  ZF_UNROLL
  for (int first = 0; first < kGroups; first += kTogether) {
    bits_t value[kTogether][kCount] = {};
    ZF_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const long long at = begin + (long long)((first + u) * kSoupThreads + int(threadIdx.x)) * kCount, left = end - at;
      const unsigned alive = mask >> (first + u) * kCount & kAll;
      if ((!kWhole && left <= 0) || alive == 0 || (alive == kAll && !moves)) continue;
      load_group<kCount>(source + at, !kWhole && left < kCount ? int(left) : kCount,
                         kWhole || (t.aligned && left >= kCount), value[u]);
    }
    ZF_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const long long at = begin + (long long)((first + u) * kSoupThreads + int(threadIdx.x)) * kCount, left = end - at;
      const unsigned alive = mask >> (first + u) * kCount & kAll;
      if ((!kWhole && left <= 0) || (alive == kAll && !moves)) continue;
      ZF_UNROLL
      for (int e = 0; e < kCount; ++e) value[u][e] = alive >> e & 1 ? value[u][e] : bits_t(0);
      store_group<kCount>(out + at, !kWhole && left < kCount ? int(left) : kCount,
                          kWhole || (t.aligned && left >= kCount), value[u]);
    }
  }
}

template <class bits_t>
__device__ inline void apply_piece(const ApplyTensor& t, long long begin, long long end) {
  if (t.aligned && end - begin == kSoupPiece)
    apply_groups<true, bits_t>(t, begin, end);
  else
    apply_groups<false, bits_t>(t, begin, end);
}

}  // namespace

__global__ void __launch_bounds__(kSoupThreads, 4) apply_mask_kernel(const __grid_constant__ ApplyJob job) {
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
