// SPDX-License-Identifier: Apache-2.0
// `_C`: facts about the build, for `zipfast info`.  Whatever is not a tensor op may be added here; no torch headers, so
// that this per-Python module stays quick to compile.  Tensor ops live in the Python-free libraries (_cpu, _cuda,
// _emu).
#include <pybind11/pybind11.h>

namespace py = pybind11;

static const char* simd_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of zipfast";
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["cuda_toolkit"] = ZF_CUDA_VERSION;
  facts["cuda_archs"] = ZF_CUDA_ARCHS;
  facts["built_with_torch"] = ZF_TORCH_VERSION;
  m.attr("build_info") = facts;
  m.def("simd_level", &simd_level, "Widest vector instructions that the CPU kernels use on this machine.");
}
