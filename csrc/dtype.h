// SPDX-License-Identifier: Apache-2.0
// The storage types of features and weights, and their exact widening.  Shared by C++ and CUDA, free of torch and of
// CUDA headers, so that the same line runs on a CPU, on a GPU and in the emulator.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ZF_HD __host__ __device__
#else
#define ZF_HD
#endif

namespace zipfast {

enum class DType : int32_t { f32, f64, f16, bf16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

ZF_HD inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
ZF_HD inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

ZF_HD inline float widen(float x) { return x; }
ZF_HD inline double widen(double x) { return x; }
ZF_HD inline float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
// Branch-free: exponent and mantissa move up by 13 bits and a multiplication by 2^112 re-biases the exponent, exactly,
// subnormals included; inf and NaN (exponent 31) keep an all-ones exponent.
ZF_HD inline float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
  const float scaled = bits_to_float(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}

// float -> 16 bits, round to nearest even; overflow gives inf, NaN stays NaN.
template <class T>
ZF_HD inline T narrow(double x);
template <>
ZF_HD inline float narrow<float>(double x) {
  return float(x);
}
template <>
ZF_HD inline double narrow<double>(double x) {
  return x;
}
template <>
ZF_HD inline BFloat16 narrow<BFloat16>(double x) {
  const uint32_t u = float_to_bits(float(x));
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
ZF_HD inline Half narrow<Half>(double x) {
  const uint32_t u = float_to_bits(float(x)), sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
  if (m > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (m >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};  // 65536 and more
  if (m < 0x38800000u) {                                    // below 2^-14: subnormal; adding 0.5 rounds at its last bit
    const float f = bits_to_float(m) + 0.5f;
    return {uint16_t(sign | (float_to_bits(f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13))};
}

// The type in which products and sums of a storage type are formed.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// Calls f with a null pointer of the storage type: dispatch(t, [&](auto* tag) { using scalar_t = ...; }).
template <class F>
inline auto dispatch(DType t, F&& f) {
  switch (t) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace zipfast
