// The support of each row: one sweep keeps the logits that may be in it, and the filters decide among those.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "blocks.h"

namespace sdkernels {
namespace {

constexpr int64_t kFirstBlock = 256;  // a bound from few logits makes the next ones cheap; blocks double from here

// What one thread reuses from row to row.
struct Workspace {
  Candidates found;
  std::vector<float> values, sorted;
  std::vector<int64_t> order, ends;

  void reserve(int64_t count) {  // and a vector more, which may be written but does not count
    if (static_cast<int64_t>(found.values.size()) >= count + kPadding) return;
    found.values.resize(2 * count + kPadding);
    found.ids.resize(2 * count + kPadding);
  }

  void keep_at_least(float bound) {
    int64_t kept = 0;
    for (int64_t i = 0; i < found.count; ++i) {  // without a branch that half of the logits would mispredict
      found.values[kept] = found.values[i];
      found.ids[kept] = found.ids[i];
      kept += found.values[i] >= bound;
    }
    found.count = kept;
  }

  // The k-th largest of the logits found; all of them if there are fewer.
  float kth_largest(int64_t k) {
    if (found.count < k) return kLowest;
    values.assign(found.values.begin(), found.values.begin() + found.count);
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    return values[k - 1];
  }
};

struct Row {
  const Kernels& kernels;
  const RowKernels& typed;
  const char* data;
  int64_t vocab, element_size;
  double temperature;
  float scale;

  Statistics of_values(const float* values, int64_t count) const {
    return kernels.rows[kFloat32].statistics(values, count, scale);
  }
};

// The least float that is not below x.
float rounded_up(double x) {
  const float nearest = static_cast<float>(x);
  return nearest < x ? std::nextafter(nearest, HUGE_VALF) : nearest;
}

float min_p_threshold(const Row& row, const Filters& filters, float max) {
  return filters.min_p > 0.0 ? rounded_up(max + row.temperature * std::log(filters.min_p)) : kLowest;
}

struct Swept {
  float max = kLowest;
  Statistics mass;    // over V, where top_p needs it
  bool valid = true;  // no NaN
};

// Finds candidates: all logits of S, of what top_p measures, and of the list are among them.
Swept sweep(const Row& row, const Filters& filters, int64_t capacity, Workspace& work) {
  const bool measures_row = filters.top_p < 1.0 && !filters.top_k;
  const bool measures_top_k = filters.top_p < 1.0 && filters.top_k;
  const int64_t most = filters.top_k ? filters.top_k : filters.active() ? 0 : capacity;  // 0: no bound on their number
  const double log_rest = std::log((1.0 - filters.top_p) / static_cast<double>(row.vocab));
  int64_t limit = 2 * most + kFirstBlock / 2, size = kFirstBlock;
  float bound = kLowest;
  Swept swept;
  work.found.count = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += size, size = std::min(2 * size, kBlock)) {
    const int64_t count = std::min(size, row.vocab - begin);
    const char* block = row.data + begin * row.element_size;
    if (measures_row) {
      swept.mass = merge(swept.mass, row.typed.statistics(block, count, row.scale), row.scale);
      // Together all logits below this hold at most 1 - top_p of the mass seen so far.
      const double below = swept.mass.max + row.temperature * (std::log(swept.mass.sum) + log_rest);
      const double margin = 1e-5 * (std::fabs(below) + row.temperature);
      if (swept.mass.sum >= 0.5) bound = std::max(bound, static_cast<float>(below - margin));
    }
    const int64_t before = work.found.count;
    work.reserve(before + count);
    swept.valid &= row.typed.collect(block, count, begin, bound, work.found);
    for (int64_t i = before; i < work.found.count; ++i) swept.max = std::max(swept.max, work.found.values[i]);
    if (most && work.found.count > limit) {
      bound = std::max(bound, work.kth_largest(most));
      work.keep_at_least(bound);
      limit = std::max(limit, 2 * work.found.count);
    }
    if (filters.min_p > 0.0 && !measures_top_k) bound = std::max(bound, min_p_threshold(row, filters, swept.max));
  }
  return swept;
}

constexpr int64_t kFew = 4096;
constexpr int64_t kBuckets = 2048;

// Sorts many values into buckets, largest first, and notes where those end; equal values share one. Returns whether
// their range is finite.
bool fill_buckets(std::vector<float>& values, Workspace& work, float max) {
  const float range = max - *std::min_element(values.begin(), values.end());
  if (!(range <= -kLowest)) return false;
  const float buckets_per_logit = (kBuckets - 1) / std::max(range, 1e-30f);
  auto bucket = [&](float z) { return static_cast<int64_t>((max - z) * buckets_per_logit); };
  work.ends.assign(kBuckets + 1, 0);
  for (float z : values) ++work.ends[bucket(z) + 1];
  std::partial_sum(work.ends.begin(), work.ends.end(), work.ends.begin());
  work.sorted.resize(values.size());
  for (float z : values) work.sorted[work.ends[bucket(z)]++] = z;  // each begin becomes its end
  values.swap(work.sorted);
  return true;
}

// The smallest logit of the nucleus: the fewest largest values whose mass reaches `target`.
float nucleus_threshold(const Row& row, Workspace& work, float max, double target) {
  auto mass = [&](const float* begin, const float* end) {
    const Statistics part = row.of_values(begin, end - begin);
    return part.sum * std::exp2(std::fmax((double(part.max) - max) * row.scale, kFloor));
  };
  std::vector<float>& values = work.values;
  float *begin = values.data(), *end = begin + values.size();
  double above = 0.0;
  if (end - begin > kFew && fill_buckets(values, work, max)) {
    float* const first = begin = values.data();
    end = begin + values.size();
    for (int64_t i = 0; i < kBuckets; ++i) {
      float* const bucket_end = first + work.ends[i];
      const double inside = begin == bucket_end ? 0.0 : mass(begin, bucket_end);
      if (above + inside >= target) {
        end = bucket_end;
        break;
      }
      if (bucket_end == end) break;  // the last ones, where the sums of the parts miss the target by their rounding
      above += inside;
      begin = bucket_end;
    }
  }
  while (end - begin > 64) {  // the mass of the upper half tells in which half the threshold is
    float* const middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, std::greater<float>());
    const double upper = mass(begin, middle);
    if (above + upper >= target) {
      end = middle;
    } else {
      above += upper;
      begin = middle;
    }
  }
  std::sort(begin, end, std::greater<float>());
  float threshold = *begin;
  for (; begin != end && above < target; ++begin) {
    threshold = *begin;
    above += std::exp2((double(threshold) - max) * row.scale);
  }
  return threshold;
}

float find_threshold(const Row& row, const Filters& filters, const Swept& swept, Workspace& work) {
  float threshold = kLowest;
  if (filters.top_k) {
    threshold = work.kth_largest(filters.top_k);
    work.keep_at_least(threshold);
  }
  if (filters.top_p < 1.0) {
    const Statistics mass = filters.top_k ? row.of_values(work.found.values.data(), work.found.count) : swept.mass;
    work.values.assign(work.found.values.begin(), work.found.values.begin() + work.found.count);
    threshold = std::max(threshold, nucleus_threshold(row, work, mass.max, filters.top_p * mass.sum));
  }
  return std::max(threshold, min_p_threshold(row, filters, swept.max));
}

int64_t write_list(const Row& row, Workspace& work, int64_t capacity, bool partial, float max, double log_sum,
                   int32_t* ids, float* log_probs) {
  const Candidates& found = work.found;
  if (capacity == 0 || (found.count > capacity && !partial)) return 0;
  const int64_t listed = std::min(capacity, found.count);
  work.order.resize(found.count);
  std::iota(work.order.begin(), work.order.end(), 0);
  std::partial_sort(work.order.begin(), work.order.begin() + listed, work.order.end(), [&](int64_t a, int64_t b) {
    return found.values[a] > found.values[b] || (found.values[a] == found.values[b] && a < b);
  });
  for (int64_t i = 0; i < listed; ++i) {
    ids[i] = found.ids[work.order[i]];
    log_probs[i] = static_cast<float>((double(found.values[work.order[i]]) - max) / row.temperature - log_sum);
  }
  return listed;
}

Statistics of_row(const Row& row) {
  Statistics total;
  for (int64_t begin = 0; begin < row.vocab; begin += kSplit) {
    const int64_t count = std::min(kSplit, row.vocab - begin);
    total = merge(total, row.typed.statistics(row.data + begin * row.element_size, count, row.scale), row.scale);
  }
  return total;
}

void support_of_row(const Row& row, const Filters& filters, int64_t capacity, bool partial, Workspace& work,
                    int64_t index, const SupportResults& results) {
  Swept swept;
  if (filters.active() || capacity > 0) swept = sweep(row, filters, capacity, work);
  float threshold = kLowest;
  Statistics kept;
  if (!filters.active()) {
    kept = of_row(row);
    results.size[index] = row.typed.count_at_least(row.data, row.vocab, kLowest);
  } else if (swept.valid && swept.max < HUGE_VALF && work.found.count > 0) {
    threshold = find_threshold(row, filters, swept, work);
    work.keep_at_least(threshold);
    kept = row.of_values(work.found.values.data(), work.found.count);
    results.size[index] = work.found.count;
  }
  if (!(kept.sum >= 0.5)) {  // the maximum alone adds 1, unless every logit is -inf or one is NaN or inf
    results.set_all(index, capacity, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const double log_sum = std::log(kept.sum);
  results.threshold[index] = threshold;
  results.max[index] = kept.max;
  results.log_sum[index] = log_sum;
  results.entropy[index] = static_cast<float>(log_sum - kept.weighted / (kLog2E * kept.sum));
  int32_t* ids = results.token_ids + index * capacity;
  float* log_probs = results.log_probs + index * capacity;
  const int64_t listed = write_list(row, work, capacity, partial, kept.max, log_sum, ids, log_probs);
  std::fill(ids + listed, ids + capacity, -1);
  std::fill(log_probs + listed, log_probs + capacity, -HUGE_VALF);
}

}  // namespace

void SupportResults::set_all(int64_t row, int64_t capacity, float value) const {
  threshold[row] = max[row] = entropy[row] = value;
  log_sum[row] = value;
  size[row] = 0;
  std::fill_n(token_ids + row * capacity, capacity, -1);
  std::fill_n(log_probs + row * capacity, capacity, -HUGE_VALF);
}

void row_support(const Kernels& kernels, const RowView& logits, const RowArguments& arguments, const Filters& filters,
                 int64_t capacity, bool partial, const SupportResults& results, const ParallelFor& parallel_for) {
  const std::vector<int64_t> kept =
      kept_rows(logits, arguments, [&](int64_t row) { results.set_all(row, capacity, 0.0f); });
  parallel_for(kept.size(), grain(logits), [&](int64_t begin, int64_t end) {
    Workspace work;
    for (int64_t i = begin; i < end; ++i) {
      const double temperature = arguments.temperature_of(kept[i]);
      const Row row{kernels,     kernels.rows[logits.dtype], logits.at(kept[i], 0), logits.vocab, logits.element_size(),
                    temperature, scale(temperature)};
      support_of_row(row, filters, capacity, partial, work, kept[i], results);
    }
  });
}

}  // namespace sdkernels
