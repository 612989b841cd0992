// Row algorithms without any framework: what one contiguous stretch of a logits row contributes to its statistics and
// to its gradient. Included once per instruction set by cpu/rows_*.cpp, which define SDK_ISA and SDK_LANES.
//
// With k = log2(e) / T and m the row's maximum, every element becomes y = (z - m) k, and softmax is 2^y / sum 2^y.
#include "cpu/rows_abi.h"

#include <cstring>

namespace sdkernels {
namespace SDK_ISA {

constexpr int kLanes = SDK_LANES;
constexpr int kUnroll = 4;  // independent accumulators hide the latency of the chained additions
constexpr int kStep = kLanes * kUnroll;
constexpr int64_t kBlock = 4096;
constexpr int64_t kFlush = 8 * kStep;  // beside a sum of 1, float loses small terms: doubles take over before it shows

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

template <class T>
struct Tail {  // the last, partial step of a row, padded with logits of -inf
  T values[kStep];
  Tail(const T* source, int64_t count) {
    const T nothing = from_float<T>(-HUGE_VALF);
    for (int i = 0; i < kStep; ++i) values[i] = i < count ? source[i] : nothing;
  }
};

template <class T>
inline void fold_maximum(const T* source, Floats (&maximum)[kUnroll]) {
  for (int i = 0; i < kUnroll; ++i) maximum[i] = larger(load(source + i * kLanes), maximum[i]);
}

template <class T>
inline void fold_sums(const T* source, float max, float scale, Floats (&sum)[kUnroll], Floats (&weighted)[kUnroll]) {
  for (int i = 0; i < kUnroll; ++i) {
    Floats y = (load(source + i * kLanes) - max) * scale;
    y = larger(fill(kSmallest), y);  // beside the maximum's 1 it adds nothing, and 0 log 0 = 0 comes free
    Floats e = exp2_normal(y);
    sum[i] += e;
    weighted[i] += e * y;
  }
}

inline float largest_lane(const Floats (&values)[kUnroll]) {  // none is NaN
  const Floats top = larger(larger(values[0], values[1]), larger(values[2], values[3]));
  float result = top[0];
  for (int lane = 1; lane < kLanes; ++lane) result = top[lane] > result ? top[lane] : result;
  return result;
}

// Adds lanes of floats to lanes of doubles, and clears them.
inline void flush(Floats (&values)[kUnroll], Doubles& total) {
  total += __builtin_convertvector((values[0] + values[1]) + (values[2] + values[3]), Doubles);
  for (Floats& value : values) value = Floats{};
}

inline double add_lanes(const Doubles& total) {
  double result = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  return result;
}

// Of at most kBlock logits, a multiple of kStep: they are read twice, the second time from L1.
template <class T>
Statistics block_statistics(const T* block, int64_t count, float scale) {
  Floats maximum[kUnroll], sum[kUnroll] = {}, weighted[kUnroll] = {};
  for (Floats& m : maximum) m = fill(kLowest);
  for (int64_t i = 0; i < count; i += kStep) fold_maximum(block + i, maximum);
  const float max = largest_lane(maximum);
  Doubles total_sum = {}, total_weighted = {};
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    const int64_t end = begin + kFlush < count ? begin + kFlush : count;
    for (int64_t i = begin; i < end; i += kStep) fold_sums(block + i, max, scale, sum, weighted);
    flush(sum, total_sum);
    flush(weighted, total_weighted);
  }
  return {max, add_lanes(total_sum), add_lanes(total_weighted)};
}

template <class T>
Statistics statistics(const T* row, int64_t count, float scale) {
  Statistics total;
  const int64_t full = count - count % kStep;
  for (int64_t begin = 0; begin < full; begin += kBlock)
    total = merge(total, block_statistics(row + begin, full - begin < kBlock ? full - begin : kBlock, scale), scale);
  if (full < count) {
    const Tail<T> tail(row + full, count - full);
    total = merge(total, block_statistics(tail.values, kStep, scale), scale);
  }
  return total;
}

template <class T, bool kEntropy>
inline void gradient_step(const T* source, T* target, const Coefficients& c) {
  for (int i = 0; i < kUnroll; ++i) {
    Floats y = (load(source + i * kLanes) - c.max) * c.scale - c.log2_sum;
    Floats slope = fill(c.slope);
    if (kEntropy) slope += c.entropy_slope * larger(fill(kFloor), y);
    Floats p = (y < kSmallest) ? Floats{} : exp2_normal(y);
    store(target + i * kLanes, p * slope);
  }
}

template <class T, bool kEntropy>
void gradient(const T* row, T* grad, int64_t count, const Coefficients& c) {
  const int64_t full = count - count % kStep;
  for (int64_t i = 0; i < full; i += kStep) gradient_step<T, kEntropy>(row + i, grad + i, c);
  if (full < count) {
    Tail<T> tail(row + full, count - full);
    gradient_step<T, kEntropy>(tail.values, tail.values, c);
    std::memcpy(grad + full, tail.values, (count - full) * sizeof(T));
  }
}

template <class T>
Statistics statistics_entry(const void* row, int64_t count, float scale) {
  return statistics(static_cast<const T*>(row), count, scale);
}

template <class T>
void gradient_entry(const void* row, void* grad, int64_t count, const Coefficients& c) {
  auto* source = static_cast<const T*>(row);
  auto* target = static_cast<T*>(grad);
  if (c.entropy_slope == 0.0f)
    gradient<T, false>(source, target, count, c);
  else
    gradient<T, true>(source, target, count, c);
}

extern const Kernels kernels;
const Kernels kernels = {
    {statistics_entry<float>, statistics_entry<BFloat16>, statistics_entry<Float16>},
    {gradient_entry<float>, gradient_entry<BFloat16>, gradient_entry<Float16>},
};

}  // namespace SDK_ISA
}  // namespace sdkernels
