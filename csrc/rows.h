// Row algorithms without any framework: what one contiguous stretch of a logits row contributes to its statistics and
// to its gradient. Part of kernels.h.
//
// With k = log2(e) / T and m the row's maximum, every element becomes y = (z - m) k, and softmax is 2^y / sum 2^y.
namespace sdkernels {
namespace SDK_ISA {

constexpr int64_t kFlush = 8 * kStep;  // beside a sum of 1, float loses small terms: doubles take over before it shows
constexpr int64_t kShortFlush = 8 * kLanes;  // as many additions to a lane as kFlush allows four accumulators

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
    store(target + i * kLanes, exp2_or_0(y) * slope);
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

}  // namespace SDK_ISA
}  // namespace sdkernels
