#include "launch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sdkernels {

namespace plain { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

constexpr int64_t kThreadWork = 32768;  // logits: less costs a thread more to start than it saves

struct Named {
  const char* name;
  const Kernels* kernels;
};

std::vector<Named> available() {
  std::vector<Named> found;
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", &avx512::kernels});
  if (has_avx2) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"plain", &plain::kernels});
  return found;
}

bool in_vocabulary(int64_t token_id, int64_t vocab) { return 0 <= token_id && token_id < vocab; }

Statistics split_statistics(const Kernels& kernels, const RowView& logits, int64_t row, int64_t split, float scale) {
  const int64_t begin = split * kSplit;
  return kernels.rows[logits.dtype].statistics(logits.at(row, begin), std::min(kSplit, logits.vocab - begin), scale);
}

void finish_row(const RowView& logits, const RowArguments& arguments, int64_t row, const Statistics& total,
                const RowResults& results) {
  const int64_t token_id = arguments.token_ids[row];
  const double log_sum = log_of_sum(total.sum);
  const bool valid = in_vocabulary(token_id, logits.vocab);
  const float invalid = valid ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const float label = valid ? element(logits, row, token_id) : invalid;
  const double centred = (static_cast<double>(label) - total.max) / arguments.temperature_of(row);
  results.log_prob[row] = centred - log_sum;  // where log_sum is -inf this and the entropy are NaN
  results.entropy[row] = static_cast<float>(log_sum - total.weighted / (kLog2E * total.sum) + 0.0 * log_sum) + invalid;
  results.max[row] = total.max;
  results.log_sum[row] = static_cast<float>(log_sum) + invalid;
}

}  // namespace

float element(const RowView& view, int64_t row, int64_t column) {
  const char* source = view.at(row, column);
  switch (view.dtype) {
    case kFloat32: return *reinterpret_cast<const float*>(source);
    case kBFloat16: return to_float(*reinterpret_cast<const BFloat16*>(source));
    default: return to_float(*reinterpret_cast<const Float16*>(source));
  }
}

void set_element(const RowView& view, int64_t row, int64_t column, float value) {
  char* target = view.at(row, column);
  switch (view.dtype) {
    case kFloat32: *reinterpret_cast<float*>(target) = value; break;
    case kBFloat16: *reinterpret_cast<BFloat16*>(target) = to_bfloat16(value); break;
    default: *reinterpret_cast<Float16*>(target) = to_float16(value);
  }
}

Statistics statistics_of(const Kernels& kernels, const RowView& logits, int64_t row, float scale) {
  Statistics total;
  for (int64_t split = 0; split * kSplit < logits.vocab; ++split)
    total = merge(total, split_statistics(kernels, logits, row, split, scale), scale);
  return total;
}

double log_of_sum(double sum) { return sum < 0.5 ? -HUGE_VAL : std::log(sum); }

float scale(double temperature) { return static_cast<float>(std::clamp(kLog2E / temperature, 1e-37, 3e38)); }

int64_t grain(const RowView& logits) { return kThreadWork / std::min(logits.vocab, kThreadWork); }

void advise_huge_pages(const RowView& fresh, const RowView& source) {
#ifdef __linux__
  if (fresh.data == source.data) return;
  int64_t last = 0;
  for (int i = 0; i < 3; ++i) last += (fresh.sizes[i] - 1) * fresh.strides[i];
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(fresh.data) + page - 1) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(fresh.data) + (last + fresh.vocab) * fresh.element_size()) / page * page;
  if (end > begin + (4 << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

char* RowView::at(int64_t row, int64_t column) const {
  const int64_t offset = row / (sizes[1] * sizes[2]) * strides[0] + row / sizes[2] % sizes[1] * strides[1] +
                         row % sizes[2] * strides[2] + column;
  return data + offset * element_size();
}

std::string instruction_sets() {
  std::string names;
  for (const Named& each : available()) names += (names.empty() ? "" : " ") + std::string(each.name);
  return names;
}

const Kernels* find_kernels(const std::string& name) {
  for (const Named& each : available())
    if (name.empty() || name == each.name) return each.kernels;
  return nullptr;
}

void row_statistics(const Kernels& kernels, const RowView& logits, const RowArguments& arguments,
                    const RowResults& results, const ParallelFor& parallel_for, int threads) {
  const std::vector<int64_t> kept = kept_rows(logits, arguments, [&](int64_t row) {
    results.log_prob[row] = results.entropy[row] = results.max[row] = results.log_sum[row] = 0.0f;
  });
  const int64_t count = static_cast<int64_t>(kept.size());
  const int64_t splits = (logits.vocab + kSplit - 1) / kSplit;
  auto scale_of = [&](int64_t row) { return scale(arguments.temperature_of(row)); };

  if (count >= 4 * threads) {
    parallel_for(count, grain(logits), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        finish_row(logits, arguments, kept[i], statistics_of(kernels, logits, kept[i], scale_of(kept[i])), results);
    });
    return;
  }
  std::vector<Statistics> parts(count * splits);
  parallel_for(count * splits, grain(logits), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = split_statistics(kernels, logits, kept[i / splits], i % splits, scale_of(kept[i / splits]));
  });
  for (int64_t i = 0; i < count; ++i) {
    Statistics total;
    for (int64_t split = 0; split < splits; ++split) total = merge(total, parts[i * splits + split], scale_of(kept[i]));
    finish_row(logits, arguments, kept[i], total, results);
  }
}

void row_gradient(const Kernels& kernels, const RowView& logits, const RowArguments& arguments, const RowResults& saved,
                  const UpstreamGradients& upstream, const RowView& grad, const ParallelFor& parallel_for) {
  advise_huge_pages(grad, logits);
  const int64_t splits = (logits.vocab + kSplit - 1) / kSplit;
  parallel_for(logits.rows() * splits, grain(logits), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / splits, begin = i % splits * kSplit, count = std::min(kSplit, logits.vocab - begin);
      char* target = grad.at(row, begin);
      // A label of probability 0 has no gradient (its log-prob is the constant -inf).
      const bool reaches_label = arguments.keeps(row) && saved.log_prob[row] != -HUGE_VALF;
      const double on_log_prob = reaches_label ? upstream.log_prob[row] : 0.0;
      const double on_entropy = arguments.keeps(row) && upstream.entropy ? upstream.entropy[row] : 0.0;
      if (!arguments.keeps(row) || (on_log_prob == 0.0 && on_entropy == 0.0 && std::isfinite(saved.log_sum[row]))) {
        std::memset(target, 0, count * grad.element_size());
        continue;
      }
      const double inverse = 1.0 / arguments.temperature_of(row);
      Coefficients c;
      c.max = saved.max[row];
      c.scale = scale(arguments.temperature_of(row));
      c.log2_sum = static_cast<float>(kLog2E * saved.log_sum[row]);
      c.slope =
          static_cast<float>(-inverse * (on_log_prob + (on_entropy == 0.0 ? 0.0 : on_entropy * saved.entropy[row])));
      c.entropy_slope = static_cast<float>(-inverse * on_entropy / kLog2E);

      const bool valid = in_vocabulary(arguments.token_ids[row], logits.vocab);
      const int64_t label = valid ? arguments.token_ids[row] - begin : -1;
      const bool holds_label = 0 <= label && label < count;
      const float label_logit = holds_label ? element(logits, row, begin + label) : 0.0f;
      kernels.rows[logits.dtype].gradient(logits.at(row, begin), target, count, c);
      if (holds_label && on_log_prob != 0.0) {  // formed anew in full precision: adding to a rounded value loses it
        const double log2_p = (static_cast<double>(label_logit) - c.max) * c.scale - c.log2_sum;
        const double p = std::exp2(log2_p);
        const double through_entropy = on_entropy == 0.0 ? 0.0 : c.entropy_slope * std::max<double>(log2_p, kFloor);
        set_element(grad, row, begin + label,
                    static_cast<float>(p * (c.slope + through_entropy) + inverse * on_log_prob));
      }
    }
  });
}

}  // namespace sdkernels
