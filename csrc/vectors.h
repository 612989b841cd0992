// Vectors of floats of one instruction set, SDK_LANES wide, and 2^y. Part of kernels.h.
#include "cpu/rows_abi.h"

#include <cstring>

namespace sdkernels {
namespace SDK_ISA {

constexpr int kLanes = SDK_LANES;
constexpr int kUnroll = 4;  // independent accumulators hide the latency of the chained additions
constexpr int kStep = kLanes * kUnroll;

typedef float Floats __attribute__((vector_size(4 * SDK_LANES)));
typedef double Doubles __attribute__((vector_size(8 * SDK_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * SDK_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * SDK_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * SDK_LANES)));

template <class V, class U>
inline V bits(U value) {
  static_assert(sizeof(V) == sizeof(U), "bit cast between sizes");
  V result;
  std::memcpy(&result, &value, sizeof(V));
  return result;
}

inline Floats fill(float value) { return value - Floats{}; }

// The larger of a and b; b where either is NaN.
inline Floats larger(Floats a, Floats b) {
#if SDK_LANES == 16
  return _mm512_max_ps(a, b);
#elif SDK_LANES == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// A bit for each lane whose a is at least b; none where either is NaN.
inline uint32_t at_least(Floats a, Floats b) {
#if SDK_LANES == 16
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif SDK_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= static_cast<uint32_t>(a[lane] >= b[lane]) << lane;
  return lanes;
#endif
}

// A bit for each lane whose a is not below b: at least b, or NaN.
inline uint32_t not_below(Floats a, Floats b) {
#if SDK_LANES == 16
  return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
#elif SDK_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= static_cast<uint32_t>(!(a[lane] < b[lane])) << lane;
  return lanes;
#endif
}

inline Floats load(const float* source) {
  Floats value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

inline Floats load(const BFloat16* source) {
#if SDK_LANES == 16
  const Words word = bits<Words>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif SDK_LANES == 8
  const Words word = bits<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
  Halves half;
  std::memcpy(&half, source, sizeof(half));
  const Words word = __builtin_convertvector(half, Words);
#endif
  return bits<Floats>(word << 16);
}

inline Floats load(const Float16* source) {
#if SDK_LANES == 16
  return bits<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif SDK_LANES == 8
  return bits<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
  Floats value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = to_float(source[lane]);
  return value;
#endif
}

inline void store(float* target, Floats value) { std::memcpy(target, &value, sizeof(value)); }

inline void store(BFloat16* target, Floats value) {
  Words word = bits<Words>(value);
  Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = (value != value) ? (word >> 16) | 0x40 : rounded;
  Halves half = __builtin_convertvector(rounded, Halves);
  std::memcpy(target, &half, sizeof(half));
}

inline void store(Float16* target, Floats value) {
#if SDK_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(bits<__m512>(value), 0));
#elif SDK_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(bits<__m256>(value), 0));
#else
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = to_float16(value[lane]);
#endif
}

// 2^y for -126 <= y <= 0 within 8e-8 relative; NaN stays NaN.
inline Floats exp2_normal(Floats y) {
  const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  Floats shifted = y + magic;
  Floats f = y - (shifted - magic);
  Floats p = fill(1.53533619e-4f);
  p = p * f + 1.33988744e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.0f;
  return p * bits<Floats>((bits<Ints>(shifted) - (bits<Ints>(magic) - 127)) << 23);
}

constexpr float kSmallest = -126.0f;  // 2^-126 is the smallest normal number

// 2^y for y <= 0, 0 where it is not a normal number.
inline Floats exp2_or_0(Floats y) { return (y < kSmallest) ? Floats{} : exp2_normal(y); }

// log2 x of a normal x > 0 within 6e-8; NaN stays NaN.
inline Floats log2_normal(Floats x) {
  const Ints half = bits<Ints>(fill(0.70710678f));  // the mantissa is brought to [sqrt(1/2), sqrt(2))
  const Ints exponent = (bits<Ints>(x) - half) >> 23;
  const Floats f = bits<Floats>(bits<Ints>(x) - (exponent << 23)) - 1.0f;
  Floats p = fill(0.125412016f);
  p = p * f - 0.210303201f;
  p = p * f + 0.21737948f;
  p = p * f - 0.238519462f;
  p = p * f + 0.287656666f;
  p = p * f - 0.360721194f;
  p = p * f + 0.480922529f;
  p = p * f - 0.721347128f;
  p = p * f + 1.44269487f;
  const Floats result = p * f + __builtin_convertvector(exponent, Floats);
  return (x != x) ? x : result;
}

template <class T>
struct Tail {  // the last, partial step of a row, padded with logits of -inf
  T values[kStep];
  Tail(const T* source, int64_t count) {
    const T nothing = from_float<T>(-HUGE_VALF);
    for (int i = 0; i < kStep; ++i) values[i] = i < count ? source[i] : nothing;
  }
};

}  // namespace SDK_ISA
}  // namespace sdkernels
