// SPDX-License-Identifier: Apache-2.0
// The thin layer between a tensor op and its CUDA launcher: device guard, torch's current stream, error check.  With
// -DZF_EMU the same glue serves the emulator, under the namespace zipfast_emu and on CPU tensors.
#pragma once
#ifndef ZF_EMU
#define USE_CUDA  // exposes the CUDA entry points of the stable shims
#endif
#include "stable.h"
#include "cuda/launch.h"

#ifdef ZF_EMU
#define ZF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(zipfast_emu, CPU, m)
#else
#define ZF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(zipfast, CUDA, m)
// Weak: the library also loads into a CPU-only torch, where this stays null and no CUDA tensor can exist.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace zipfast {

#ifdef ZF_EMU
struct CudaScope {
  explicit CudaScope(const Tensor&) {}
  cudaStream_t stream = nullptr;
  int capability() const { return 0; }  // no path of a certain generation is taken unless it is asked for by name
};
inline const char* cuda_error(cudaError_t) { return "emulated CUDA error"; }
#else
struct CudaScope {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  explicit CudaScope(const Tensor& t) : guard(t.get_device_index()) {
    void* s = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s));
    stream = static_cast<cudaStream_t>(s);
  }
  // Compute capability of the current device, 90 for 9.0.
  int capability() const {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
  }
};
inline const char* cuda_error(cudaError_t e) { return cudaGetErrorString(e); }
#endif

inline void check_launch(const char* op, cudaError_t e) {
  STD_TORCH_CHECK(e == cudaSuccess, op, ": the CUDA launch failed: ", cuda_error(e));
}

}  // namespace zipfast
