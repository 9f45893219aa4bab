// SPDX-License-Identifier: Apache-2.0
// Matrix instructions of a warp (compute capability 8.0 and newer), all lanes together:
//   ldmatrix_x4    four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of
//                  matrix l / 8 (16 bytes, aligned), and gets of each matrix row l / 4, columns 2 (l % 4) and the next.
//   mma_m16n8k16   d += a b^T with a [16, 16] and b [8, 16], d in float32: lane l holds rows l / 4 and l / 4 + 8,
//                  columns 2 (l % 4) and the next.  Its sums are cut off, not rounded: see split.cuh.
#pragma once
#ifdef ZF_EMU
#include "../emu/tensor_core.h"
#else
#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace zipfast::cuda {

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#endif  // older code: no path that leads here (moments_code)
}

template <class half_t>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
#define ZF_MMA(type)                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same<half_t, BFloat16>::value)
    ZF_MMA("bf16");
  else
    ZF_MMA("f16");
#undef ZF_MMA
#endif  // older code: no path that leads here (moments_code)
}

}  // namespace zipfast::cuda
#endif
