// Row algorithms on a support S = {v : z_v >= threshold}: finding it, and what it adds to sums and gradients. Part of
// kernels.h. All but the search work on blocks of floats, their length a multiple of kStep.
namespace sdkernels {
namespace SDK_ISA {

// Appends the logits that are at least `bound` and where they are; false if one is NaN.
template <class T>
bool collect(const T* block, int64_t count, int64_t first_id, float bound, Candidates& found) {
  const Floats bounds = fill(bound);
  Words largest{};
  auto append = [&](Floats z, int64_t id) {
    uint32_t lanes = at_least(z, bounds);
#if SDK_LANES == 16
    _mm512_storeu_ps(&found.values[found.count], _mm512_maskz_compress_ps(lanes, bits<__m512>(z)));
    const Ints ids = static_cast<int32_t>(id) + Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    _mm512_storeu_si512(&found.ids[found.count], _mm512_maskz_compress_epi32(lanes, bits<__m512i>(ids)));
    found.count += __builtin_popcount(lanes);
#else
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      found.values[found.count] = z[lane];
      found.ids[found.count++] = static_cast<int32_t>(id + lane);
    }
#endif
  };
  auto step = [&](const T* source, int64_t id) {
    Floats z[kUnroll];
    for (int i = 0; i < kUnroll; ++i) {
      z[i] = load(source + i * kLanes);
      const Words doubled = bits<Words>(z[i]) << 1;  // without its sign, a NaN is larger than any number
      largest = doubled > largest ? doubled : largest;
    }
    const Floats top = larger(larger(z[0], z[1]), larger(z[2], z[3]));
    if (!at_least(top, bounds)) return;
    for (int i = 0; i < kUnroll; ++i) append(z[i], id + i * kLanes);
  };
  const int64_t full = count - count % kStep;
  for (int64_t i = 0; i < full; i += kStep) step(block + i, first_id + i);
  if (full < count) {
    const Tail<T> tail(block + full, count - full);
    step(tail.values, first_id + full);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (largest[lane] > 0xff000000u) return false;
  return true;
}

template <class T>
int64_t count_at_least(const T* row, int64_t count, float bound) {
  int64_t total = 0;
  const int64_t full = count - count % kStep;
  for (int64_t i = 0; i < full; i += kLanes) total += __builtin_popcount(at_least(load(row + i), fill(bound)));
  for (int64_t i = full; i < count; ++i) total += to_float(row[i]) >= bound;
  return total;
}

template <class T>
void widen(const T* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(target + i, load(source + i));
}

template <class T>
void narrow(const float* source, T* target, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(target + i, load(source + i));
}

inline double add_lanes(Floats values) { return add_lanes(__builtin_convertvector(values, Doubles)); }

inline float largest_lane(Floats values) {
  float result = values[0];
  for (int lane = 1; lane < kLanes; ++lane) result = values[lane] > result ? values[lane] : result;
  return result;
}

// In the pair's sums S is what is not below the threshold: a NaN of the base stays in, and shows.
inline PairStatistics pair_statistics(const float* student, const float* base, int64_t count, const PairScales& c) {
  Floats max = fill(kLowest), support_max = fill(kLowest), base_max = fill(kLowest);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats z = load(student + i), b = load(base + i);
    max = larger(z, max);
    support_max = larger((b < c.threshold) ? fill(kLowest) : z, support_max);
    base_max = larger(b, base_max);
  }
  PairStatistics result;
  result.max = largest_lane(max);
  result.support_max = largest_lane(support_max);
  result.base_max = largest_lane(base_max);
  for (int64_t begin = 0; begin < count; begin += kShortFlush) {
    Floats sum{}, support_sum{}, tempered_sum{}, base_sum{}, base_weighted{}, cross{};
    const int64_t end = begin + kShortFlush < count ? begin + kShortFlush : count;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats z = load(student + i), b = load(base + i);
      sum += exp2_or_0((z - result.max) * c.student);
      const uint32_t inside = not_below(b, fill(c.threshold));
      if (!inside) continue;
      result.size += __builtin_popcount(inside);
      result.impossible |= (inside & ~not_below(z, fill(kLowest))) != 0;
      const Floats centred = (b < c.threshold) ? fill(-HUGE_VALF) : z - result.support_max;
      const Floats y = (b < c.threshold) ? fill(-HUGE_VALF) : (b - result.base_max) * c.tempered;
      const Floats e = exp2_or_0(y);
      support_sum += exp2_or_0(centred * c.student);
      tempered_sum += exp2_or_0(centred * c.tempered);
      base_sum += e;
      base_weighted += e * larger(fill(kSmallest), y);
      cross += (e == 0.0f || z < kLowest) ? Floats{} : e * centred;
    }
    result.sum += add_lanes(sum);
    result.support_sum += add_lanes(support_sum);
    result.tempered_sum += add_lanes(tempered_sum);
    result.base_sum += add_lanes(base_sum);
    result.base_weighted += add_lanes(base_weighted);
    result.cross += add_lanes(cross);
  }
  return result;
}

inline void pair_gradient(const float* student, const float* base, float* grad, int64_t count,
                          const PairCoefficients& c) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats z = load(student + i), b = load(base + i);
    Floats g = c.on_p * exp2_or_0((z - c.max) * c.scales.student - c.log2_sum);
    if (not_below(b, fill(c.scales.threshold))) {
      const Floats centred = z - c.support_max;
      Floats on_support = c.on_q * exp2_or_0((b - c.base_max) * c.scales.tempered - c.base_log2_sum);
      on_support += c.on_support_p * exp2_or_0(centred * c.scales.student - c.support_log2_sum);
      on_support += c.on_tempered_p * exp2_or_0(centred * c.scales.tempered - c.tempered_log2_sum);
      g += (b < c.scales.threshold) ? Floats{} : on_support;
    }
    store(grad + i, g);
  }
}

inline void log_softmax(const float* logits, float* result, int64_t count, const SupportCoefficients& c) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats z = load(logits + i);
    store(result + i, (z < c.threshold) ? fill(-HUGE_VALF) : (z - c.max) * c.inverse - c.log_sum);
  }
}

inline double sum_inside(const float* logits, const float* upstream, int64_t count, float threshold) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    Floats sum{};
    const int64_t end = begin + kFlush < count ? begin + kFlush : count;
    for (int64_t i = begin; i < end; i += kLanes) sum += (load(logits + i) < threshold) ? Floats{} : load(upstream + i);
    total += add_lanes(sum);
  }
  return total;
}

// `upstream` may be null: none.
inline void support_gradient(const float* logits, const float* upstream, float* grad, int64_t count,
                             const SupportCoefficients& c) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats z = load(logits + i);
    const Floats y = (z - c.max) * c.scale - c.log2_sum;
    Floats g = exp2_or_0(y) * (c.slope + c.entropy_slope * larger(fill(kFloor), y));
    if (upstream) g += load(upstream + i) * c.inverse;
    store(grad + i, (z < c.threshold) ? Floats{} : g);
  }
}

}  // namespace SDK_ISA
}  // namespace sdkernels
