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
constexpr float kFloor = -200.0f;            // 2^y is 0 below: stands for -inf where 0 multiplies it

inline float to_float(float value) { return value; }

inline float float_of_bits(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

inline float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const float finite = float_of_bits(rest) * 0x1p112f;  // the exponents' biases differ by 112; subnormals come out right
  return float_of_bits(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : bits_of_float(finite)));
}

inline BFloat16 to_bfloat16(float value) {  // to nearest, ties to even, as are all roundings here
  const uint32_t word = bits_of_float(value);
  const uint32_t rounded = value != value ? word >> 16 | 0x40 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(rounded)};
}

inline Float16 to_float16(float value) {
  const uint32_t sign = bits_of_float(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  const uint32_t word = bits_of_float(magnitude);
  uint32_t half;
  if (value != value)
    half = 0x7e00;
  else if (magnitude >= 65520.0f)
    half = 0x7c00;
  else if (magnitude < 0x1p-14f)  // the sum's last place is 2^-24, that of the subnormals
    half = bits_of_float(magnitude + 0.5f) - bits_of_float(0.5f);
  else
    half = (word - (112u << 23) + 0xfff + (word >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
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
  double sum = 0.0;
  double weighted = 0.0;
};

inline Statistics merge(const Statistics& a, const Statistics& b, float scale) {
  Statistics result;
  result.max = a.max > b.max ? a.max : b.max;
  for (const Statistics* part : {&a, &b}) {
    const double shift = std::fmax((part->max - result.max) * scale, kFloor);
    const double factor = std::exp2(shift);
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
