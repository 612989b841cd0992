// What cpu/launch.cpp and the row algorithms of one instruction set say to each other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

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
  // The exponents' biases differ by 112; subnormals come out right.
  const float finite = float_of_bits(rest) * 0x1p112f;
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

// Logits found so far, in the order of their ids; the vectors have room for a block more.
struct Candidates {
  std::vector<float> values;
  std::vector<int32_t> ids;
  int64_t count = 0;
};

// Factors on centred logits: log2(e) for the student's distribution, log2(e) / T for the tempered ones; S of the base.
struct PairScales {
  float student, tempered, threshold;
};

// Of a stretch of student logits z and base logits b: sums of 2^y relative to their own maxima, over V and over S.
struct PairStatistics {
  float max = kLowest, support_max = kLowest, base_max = kLowest;
  double sum = 0.0;                              // over V, of exp(z - max)
  double support_sum = 0.0, tempered_sum = 0.0;  // over S, of exp(z - support_max) and exp((z - support_max) / T)
  double base_sum = 0.0, base_weighted = 0.0;    // over S, of e = 2^y with y = (b - base_max) log2(e) / T, and of e y
  double cross = 0.0;                            // over S, of e (z - support_max)
  int64_t size = 0;
  bool impossible = false;  // z is -inf somewhere in S: cross is then -inf, and has no part of it here
};

inline double factor(float from, float to, double scale) {
  return std::exp2(std::fmax((double(from) - to) * scale, kFloor));
}

inline PairStatistics merge(const PairStatistics& a, const PairStatistics& b, const PairScales& scales) {
  PairStatistics r;
  r.max = a.max > b.max ? a.max : b.max;
  r.support_max = a.support_max > b.support_max ? a.support_max : b.support_max;
  r.base_max = a.base_max > b.base_max ? a.base_max : b.base_max;
  for (const PairStatistics* part : {&a, &b}) {
    const double shift = std::fmax((double(part->base_max) - r.base_max) * scales.tempered, kFloor);
    const double base_factor = shift > kFloor ? std::exp2(shift) : 0.0;  // so small a q is 0
    r.sum += part->sum * factor(part->max, r.max, scales.student);
    r.support_sum += part->support_sum * factor(part->support_max, r.support_max, scales.student);
    r.tempered_sum += part->tempered_sum * factor(part->support_max, r.support_max, scales.tempered);
    r.base_sum += part->base_sum * base_factor;
    r.base_weighted += (part->base_weighted + shift * part->base_sum) * base_factor;
    if (base_factor > 0.0)
      r.cross += (part->cross + (double(part->support_max) - r.support_max) * part->base_sum) * base_factor;
    r.size += part->size;
    r.impossible |= part->impossible;
  }
  return r;
}

// grad_v = on_p p + [v in S] (on_support_p p_S + on_tempered_p p_ST + on_q q), each from its maximum and log2 sum.
struct PairCoefficients {
  PairScales scales;
  float max, log2_sum, support_max, support_log2_sum, tempered_log2_sum, base_max, base_log2_sum;
  float on_p, on_support_p, on_tempered_p, on_q;
};

// On S: log q = (z - max) inverse - log_sum, y = log2 q, and grad = 2^y (slope + entropy_slope y) + upstream inverse.
struct SupportCoefficients {
  float threshold, max, inverse, log_sum, scale, log2_sum, slope, entropy_slope;
};

// Of two rows of logits z and z': maxima, the sums of e = 2^(x scale) and of 2^(x' scale), and that of e (x' - x), with
// x = z - max and x' alike.
struct DivergenceSums {
  float max = kLowest, other_max = kLowest;
  double sum = 0.0, other_sum = 0.0, cross = 0.0;
  bool impossible = false;  // z' is -inf where z is not: cross is then -inf, and has no part of it here
};

inline DivergenceSums merge(const DivergenceSums& a, const DivergenceSums& b, double scale) {
  DivergenceSums r;
  r.max = a.max > b.max ? a.max : b.max;
  r.other_max = a.other_max > b.other_max ? a.other_max : b.other_max;
  for (const DivergenceSums* part : {&a, &b}) {
    const double shift = double(part->max) - r.max, other_shift = double(part->other_max) - r.other_max;
    const double factor = shift * scale > kFloor ? std::exp2(shift * scale) : 0.0;  // so small a probability is 0
    r.sum += part->sum * factor;
    if (factor > 0.0) r.cross += (part->cross + (other_shift - shift) * part->sum) * factor;
    r.other_sum += part->other_sum * std::exp2(std::fmax(other_shift * scale, kFloor));
    r.impossible |= part->impossible;
  }
  return r;
}

enum Divergence { kForwardKL, kReverseKL, kJSD };

// log2 P = (z - max) scale - log2_sum of student and teacher, and what a divergence makes of them.
struct DivergenceCoefficients {
  Divergence divergence;
  float scale, max, log2_sum, other_max, other_log2_sum;
  float beta, rest;               // of the JSD: beta and 1 - beta
  float clip;                     // of an entry l, inf for none
  float slope = 0.0f, on = 0.0f;  // grad_v = on (dl_v / dlog P_v - slope P_v)
};

struct EntrySums {
  double value = 0.0, slope = 0.0;  // of clipped entries l and of dl / dlog P
};

// Means over `samples` rows of teachers q_r: sums of q_r log(q_r / p), q log(q / p) and q_r log(q_r / q), in nats.
struct InformationSums {
  double total = 0.0, marginal = 0.0, information = 0.0;
};

// Of the logits that are at least a pivot: their number, and sums of 2^y and y 2^y.
struct Masses {
  int64_t count = 0;
  double mass = 0.0, moment = 0.0;
};

struct LogSoftmax {
  float max, log2_sum;
};

enum Dtype { kFloat32, kBFloat16, kFloat16 };

struct RowKernels {  // of one dtype
  Statistics (*statistics)(const void* row, int64_t count, float scale);
  void (*gradient)(const void* row, void* grad, int64_t count, const Coefficients&);
  bool (*collect)(const void* block, int64_t count, int64_t first_id, float bound, Candidates&);
  int64_t (*count_at_least)(const void* row, int64_t count, float bound);
  void (*widen)(const void* source, float* target, int64_t count);
  void (*narrow)(const float* source, void* target, int64_t count);
};

struct Kernels {
  RowKernels rows[3];  // by Dtype
  PairStatistics (*pair_statistics)(const float* student, const float* base, int64_t count, const PairScales&);
  void (*pair_gradient)(const float* student, const float* base, float* grad, int64_t count, const PairCoefficients&);
  void (*log_softmax)(const float* logits, float* result, int64_t count, const SupportCoefficients&);
  double (*sum_inside)(const float* logits, const float* upstream, int64_t count, float threshold);
  void (*support_gradient)(const float* logits, const float* upstream, float* grad, int64_t count,
                           const SupportCoefficients&);
  DivergenceSums (*divergence_sums)(const float* row, const float* other, int64_t count, float scale);
  EntrySums (*divergence_entries)(const float* student, const float* teacher, int64_t count,
                                  const DivergenceCoefficients&);
  void (*divergence_gradient)(const float* student, const float* teacher, float* grad, int64_t count,
                              const DivergenceCoefficients&);
  InformationSums (*information)(const float* student, const LogSoftmax&, const float* const* teachers,
                                 const LogSoftmax* softmaxes, int64_t samples, int64_t count, float scale);
  void (*masses)(const float* logits, int64_t count, float max, float scale, const float* pivots, int64_t number,
                 Masses* totals);
};

constexpr int64_t kBlock = 4096;        // logits that stay in L1 while several loops read them
constexpr int64_t kMassesBlock = 1024;  // fewer, for four floats more of each stay with them

}  // namespace sdkernels
