// What cpu/launch.cpp and the row algorithms of one instruction set say to each other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace sdkernels {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr float kLowest = -3.402823466e38f;  // the maximum of no logits: below every finite one
constexpr float kLeast = -1e30f;             // stands for -inf where 0 multiplies it

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}

inline float to_float(Float16 value) {
  const int sign = value.bits >> 15, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = mantissa ? NAN : HUGE_VALF;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  else
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return sign ? -magnitude : magnitude;
}

inline BFloat16 to_bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  if (value != value) return {static_cast<uint16_t>(word >> 16 | 0x40)};
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

inline Float16 to_float16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (value != value) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 6.103515625e-5f)  // subnormal: a multiple of 2^-24, and 1024 of them carry into the first normal
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))))};
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));  // 2048 carries into the exponent
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + mantissa - 1024))};
}

template <class T>
inline T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  return to_bfloat16(value);
}
template <>
inline Float16 from_float<Float16>(float value) {
  return to_float16(value);
}

// Of the logits z of a stretch: m = max z, sum 2^y and sum y 2^y with y = (z - m) scale.
struct Statistics {
  float max = kLowest;
  float sum = 0.0f;
  float weighted = 0.0f;
};

inline Statistics merge(const Statistics& a, const Statistics& b, float scale) {
  Statistics result;
  result.max = a.max > b.max ? a.max : b.max;
  for (const Statistics* part : {&a, &b}) {
    float shift = (part->max - result.max) * scale;
    if (shift < kLeast) shift = kLeast;
    const float factor = std::exp2(shift);
    result.sum += part->sum * factor;
    result.weighted += (part->weighted + shift * part->sum) * factor;
  }
  return result;
}

// grad_v = 2^y (slope + entropy_slope y) with y = (z - max) scale - log2_sum = log2 p_v; the label adds its own term.
struct Coefficients {
  float max, scale, log2_sum, slope, entropy_slope;
};

enum Dtype { kFloat32, kBFloat16, kFloat16 };

struct Kernels {  // indexed by Dtype
  Statistics (*statistics[3])(const void* row, int64_t count, float scale);
  void (*gradient[3])(const void* row, void* grad, int64_t count, const Coefficients&);
};

}  // namespace sdkernels
