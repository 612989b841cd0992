// Row algorithms on a student's and one or more teachers' logits. Part of kernels.h. They work on blocks of floats,
// their length a multiple of kLanes, padded with -inf.
namespace sdkernels {
namespace SDK_ISA {

constexpr float kLn2 = 0.69314718f;

// p log(p / q) from log2: 0 where p is 0, inf where only q is; p may underflow, log2 p tells.
inline Floats relative(Floats p, Floats log2_p, Floats log2_q) {
  const Floats nothing = fill(-HUGE_VALF);
  const Floats value = (p == 0.0f) ? Floats{} : p * (log2_p - log2_q) * kLn2;
  return ((log2_q == nothing) & (log2_p > nothing)) ? fill(HUGE_VALF) : value;
}

inline DivergenceSums divergence_sums(const float* row, const float* other, int64_t count, float scale) {
  Floats max = fill(kLowest), other_max = fill(kLowest);
  for (int64_t i = 0; i < count; i += kLanes) {
    max = larger(load(row + i), max);
    other_max = larger(load(other + i), other_max);
  }
  DivergenceSums result;
  result.max = largest_lane(max);
  result.other_max = largest_lane(other_max);
  uint32_t impossible = 0;
  for (int64_t begin = 0; begin < count; begin += kShortFlush) {
    Floats sum{}, other_sum{}, cross{};
    const int64_t end = begin + kShortFlush < count ? begin + kShortFlush : count;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats z = load(row + i), z_other = load(other + i);
      const Floats x = z - result.max, x_other = z_other - result.other_max;
      const Floats e = exp2_or_0(x * scale);
      const uint32_t excluded = ~not_below(z_other, fill(kLowest)) & not_below(z, fill(kLowest));
      impossible |= excluded;
      sum += e;
      other_sum += exp2_or_0(x_other * scale);
      cross += ((e == 0.0f) | (z_other < kLowest)) ? Floats{} : e * (x_other - x);
    }
    result.sum += add_lanes(sum);
    result.other_sum += add_lanes(other_sum);
    result.cross += add_lanes(cross);
  }
  result.impossible = impossible != 0;
  return result;
}

// Only that of -inf is -inf.
inline Floats log2_softmax(Floats z, float max, float log2_sum, float scale) {
  return (z < kLowest) ? z : larger(fill(kLowest), (z - max) * scale - log2_sum);
}

struct Entry {
  Floats value, slope, p;
};

// A token's part l of D = sum l, and dl / dlog P. Of the JSD with M relative to the larger of both probabilities: log2
// of that is between log2 of beta or 1 - beta and 0.
template <Divergence kDivergence>
inline Entry divergence_entry(Floats z, Floats z_other, const DivergenceCoefficients& c) {
  if (kDivergence == kJSD) {
    const Floats log2_p = larger(fill(kFloor), (z - c.max) * c.scale - c.log2_sum);
    const Floats log2_q = larger(fill(kFloor), (z_other - c.other_max) * c.scale - c.other_log2_sum);
    const Floats gap = log2_q - log2_p, above = larger(Floats{}, gap), below = -larger(Floats{}, -gap);
    const Floats ratio = exp2_or_0(below - above), most = exp2_or_0(larger(log2_p, log2_q));
    const Floats share_p = (gap > 0.0f) ? ratio : fill(1.0f), share_q = (gap > 0.0f) ? fill(1.0f) : ratio;
    const Floats log2_m = log2_normal(c.beta * share_q + c.rest * share_p);
    const Floats p = most * share_p;
    const Floats slope = -c.rest * kLn2 * p * (above + log2_m);
    return {slope + c.beta * kLn2 * most * share_q * (below - log2_m), slope, p};
  }
  const Floats log2_p = log2_softmax(z, c.max, c.log2_sum, c.scale);
  const Floats log2_q = log2_softmax(z_other, c.other_max, c.other_log2_sum, c.scale);
  const Floats p = exp2_or_0(log2_p), q = exp2_or_0(log2_q);
  if (kDivergence == kForwardKL) return {relative(q, log2_q, log2_p), -q, p};
  const Floats value = relative(p, log2_p, log2_q);
  return {value, value + p, p};
}

template <Divergence kDivergence>
EntrySums entry_sums(const float* student, const float* teacher, int64_t count, const DivergenceCoefficients& c) {
  EntrySums result;
  for (int64_t begin = 0; begin < count; begin += kShortFlush) {
    Floats value{}, slope{};
    const int64_t end = begin + kShortFlush < count ? begin + kShortFlush : count;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Entry entry = divergence_entry<kDivergence>(load(student + i), load(teacher + i), c);
      value += (entry.value > c.clip) ? fill(c.clip) : entry.value;
      slope += (entry.value > c.clip) ? Floats{} : entry.slope;
    }
    result.value += add_lanes(value);
    result.slope += add_lanes(slope);
  }
  return result;
}

template <Divergence kDivergence>
void entry_gradient(const float* student, const float* teacher, float* grad, int64_t count,
                    const DivergenceCoefficients& c) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Entry entry = divergence_entry<kDivergence>(load(student + i), load(teacher + i), c);
    const Floats slope = (entry.value > c.clip) ? Floats{} : entry.slope;
    store(grad + i, c.on * (slope - c.slope * entry.p));
  }
}

inline EntrySums divergence_entries(const float* student, const float* teacher, int64_t count,
                                    const DivergenceCoefficients& c) {
  switch (c.divergence) {
    case kForwardKL: return entry_sums<kForwardKL>(student, teacher, count, c);
    case kReverseKL: return entry_sums<kReverseKL>(student, teacher, count, c);
    default: return entry_sums<kJSD>(student, teacher, count, c);
  }
}

inline void divergence_gradient(const float* student, const float* teacher, float* grad, int64_t count,
                                const DivergenceCoefficients& c) {
  switch (c.divergence) {
    case kForwardKL: return entry_gradient<kForwardKL>(student, teacher, grad, count, c);
    case kReverseKL: return entry_gradient<kReverseKL>(student, teacher, grad, count, c);
    default: return entry_gradient<kJSD>(student, teacher, grad, count, c);
  }
}

inline InformationSums information(const float* student, const LogSoftmax& p, const float* const* teachers,
                                   const LogSoftmax* softmaxes, int64_t samples, int64_t count, float scale) {
  InformationSums result;
  const int64_t stretch = samples < 8 ? kShortFlush / samples / kLanes * kLanes : kLanes;
  for (int64_t begin = 0; begin < count; begin += stretch) {
    Floats total{}, marginal{}, between{};
    const int64_t end = begin + stretch < count ? begin + stretch : count;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats log2_p = log2_softmax(load(student + i), p.max, p.log2_sum, scale);
      auto log2_of = [&](int64_t r) {
        return log2_softmax(load(teachers[r] + i), softmaxes[r].max, softmaxes[r].log2_sum, scale);
      };
      Floats mean{}, largest = fill(-HUGE_VALF);
      for (int64_t r = 0; r < samples; ++r) {
        const Floats log2_q = log2_of(r), q = exp2_or_0(log2_q);
        total += relative(q, log2_q, log2_p);
        mean += q;
        largest = larger(log2_q, largest);
      }
      mean /= static_cast<float>(samples);
      // Where the mean underflows its logarithm counts nothing, but whether it is 0 does: the largest tells.
      const Floats log2_mean = (mean < 0x1p-126f) ? largest : log2_normal(mean);
      marginal += relative(mean, log2_mean, log2_p);
      for (int64_t r = 0; r < samples; ++r) {
        const Floats log2_q = log2_of(r);
        between += relative(exp2_or_0(log2_q), log2_q, log2_mean);
      }
    }
    result.total += add_lanes(total);
    result.marginal += add_lanes(marginal);
    result.information += add_lanes(between);
  }
  result.total /= static_cast<double>(samples);
  result.information /= static_cast<double>(samples);
  return result;
}

}  // namespace SDK_ISA
}  // namespace sdkernels
