// What the logits that are not below a pivot add up to, for several pivots. Part of kernels.h.
namespace sdkernels {
namespace SDK_ISA {

constexpr int kMassesUnroll = 2;  // of four sums each

// A number between -1 and 1 as a multiple of 2^-13, so that sums of many lose nothing, and the rest.
inline void store_parts(Floats x, float* coarse, float* fine) {
  const Floats rounded = (x + 1536.0f) - 1536.0f;
  store(coarse, rounded);
  store(fine, x - rounded);
}

template <int kCount>
inline double add_parts(const Floats (&coarse)[kCount], const Floats (&fine)[kCount]) {
  Doubles total{};
  for (int i = 0; i < kCount; ++i)
    total += __builtin_convertvector(coarse[i], Doubles) + __builtin_convertvector(fine[i], Doubles);
  return add_lanes(total);
}

// Adds a block of floats, at most kMassesBlock and a multiple of kStep, to the totals of each of `number` pivots, with
// y = (z - max) scale <= 0.
inline void masses(const float* logits, int64_t count, float max, float scale, const float* pivots, int64_t number,
                   Masses* totals) {
  alignas(64) float parts[4][kMassesBlock];  // of 2^y coarse and fine, of y 2^y coarse and fine
  Floats largest = fill(-HUGE_VALF);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats z = load(logits + i), y = (z - max) * scale, e = exp2_or_0(y);
    largest = larger(z, largest);
    store_parts(e, parts[0] + i, parts[1] + i);
    store_parts(e * larger(fill(kSmallest), y), parts[2] + i, parts[3] + i);
  }
  const float top = largest_lane(largest);
  for (int64_t g = 0; g < number; ++g) {
    if (!(top >= pivots[g])) continue;
    const Floats pivot = fill(pivots[g]);
    Floats sums[4][kMassesUnroll] = {};
    Ints number_above[kMassesUnroll] = {};
    for (int64_t begin = 0; begin < count; begin += kMassesUnroll * kLanes) {
      for (int i = 0; i < kMassesUnroll; ++i) {
        const int64_t at = begin + i * kLanes;
        const Floats z = load(logits + at);
        number_above[i] -= z >= pivot;  // true is -1
        for (int part = 0; part < 4; ++part) sums[part][i] += (z >= pivot) ? load(parts[part] + at) : Floats{};
      }
    }
    for (const Ints& each : number_above)
      for (int lane = 0; lane < kLanes; ++lane) totals[g].count += each[lane];
    totals[g].mass += add_parts(sums[0], sums[1]);
    totals[g].moment += add_parts(sums[2], sums[3]);
  }
}

}  // namespace SDK_ISA
}  // namespace sdkernels
