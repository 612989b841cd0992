// Divergences of student and teacher rows, rows reduced to listed tokens and a tail, and Theorem 1's terms.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "blocks.h"

namespace sdkernels {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kSampledBlock = 512;  // columns: those of a few teachers fit L1 together

// Calls body(z, other, begin, count) on each block of two rows.
template <class Body>
void for_blocks(const Kernels& kernels, const RowView& logits, const RowView& other, int64_t row, const Body& body) {
  alignas(64) float buffer[kBlock], other_buffer[kBlock];
  for (int64_t begin = 0; begin < logits.vocab; begin += kBlock) {
    const int64_t count = std::min(kBlock, logits.vocab - begin);
    body(read_block(kernels, logits, row, begin, count, -HUGE_VALF, buffer),
         read_block(kernels, other, row, begin, count, -HUGE_VALF, other_buffer), begin, count);
  }
}

DivergenceCoefficients coefficients(const DivergenceOptions& options, double temperature,
                                    const DivergenceResults& saved, int64_t row) {
  DivergenceCoefficients c{};
  c.divergence = options.divergence;
  c.scale = scale(temperature);
  c.max = saved.max[row];
  c.log2_sum = static_cast<float>(kLog2E * saved.log_sum[row]);
  c.other_max = saved.teacher_max[row];
  c.other_log2_sum = static_cast<float>(kLog2E * saved.teacher_log_sum[row]);
  c.beta = static_cast<float>(options.beta);
  c.rest = static_cast<float>(1.0 - options.beta);
  c.clip = static_cast<float>(options.token_clip);
  return c;
}

// The divergence and its slope by the entries, where the log sums are known.
EntrySums sum_entries(const Kernels& kernels, const RowView& student, const RowView& teacher,
                      const DivergenceCoefficients& c, int64_t row) {
  EntrySums total;
  for_blocks(kernels, student, teacher, row, [&](const float* z, const float* other, int64_t, int64_t count) {
    const EntrySums part = kernels.divergence_entries(z, other, padded(count), c);
    total.value += part.value;
    total.slope += part.slope;
  });
  return total;
}

// Of a row from another one, with sums of both.
DivergenceSums kl_sums(const Kernels& kernels, const RowView& logits, const RowView& other, float by, int64_t row) {
  DivergenceSums total;
  for_blocks(kernels, logits, other, row, [&](const float* z, const float* z_other, int64_t, int64_t count) {
    total = merge(total, kernels.divergence_sums(z, z_other, padded(count), by), by);
  });
  return total;
}

struct Normaliser {
  float max;
  double log_sum;  // not finite if the row has no distribution
};

void divergence_of_row(const Kernels& kernels, const RowView& student, const RowView& teacher, double temperature,
                       const DivergenceOptions& options, const DivergenceNormalisers& known,
                       const DivergenceResults& results, int64_t row) {
  const float by = scale(temperature);
  const bool by_entries = known.log_sum || options.divergence == kJSD || std::isfinite(options.token_clip);
  const bool forward = options.divergence == kForwardKL;
  Normaliser of_student, of_teacher;
  double kl = 0.0;
  if (known.log_sum) {
    of_student = {known.max[row], known.log_sum[row]};
    of_teacher = {known.teacher_max[row], known.teacher_log_sum[row]};
  } else if (by_entries) {
    const Statistics p = statistics_of(kernels, student, row, by), q = statistics_of(kernels, teacher, row, by);
    of_student = {p.max, log_of_sum(p.sum)};
    of_teacher = {q.max, log_of_sum(q.sum)};
  } else {
    const DivergenceSums sums =
        forward ? kl_sums(kernels, teacher, student, by, row) : kl_sums(kernels, student, teacher, by, row);
    const Normaliser weighing = {sums.max, log_of_sum(sums.sum)}, other = {sums.other_max, log_of_sum(sums.other_sum)};
    kl = sums.impossible ? HUGE_VAL : other.log_sum - weighing.log_sum - sums.cross / (sums.sum * temperature);
    of_student = forward ? other : weighing;
    of_teacher = forward ? weighing : other;
  }
  const double invalid = 0.0 * (of_student.log_sum + of_teacher.log_sum);
  results.log_sum[row] = of_student.log_sum;
  results.teacher_log_sum[row] = of_teacher.log_sum;
  results.max[row] = of_student.max;
  results.teacher_max[row] = of_teacher.max;
  EntrySums total = {kl, forward ? -1.0 : kl + 1.0};
  if (by_entries && invalid == 0.0)
    total = sum_entries(kernels, student, teacher, coefficients(options, temperature, results, row), row);
  results.divergence[row] = total.value + invalid;
  results.slope[row] = total.slope == HUGE_VAL ? kNaN : total.slope + invalid;
}

// Of the tokens that are not listed.
Statistics tail_statistics(const Kernels& kernels, const RowView& logits, double temperature,
                           const std::vector<int32_t>& sorted_ids, int64_t row) {
  alignas(64) float buffer[kBlock];
  Statistics total;
  auto id = sorted_ids.begin();
  for (int64_t begin = 0; begin < logits.vocab; begin += kBlock) {
    const int64_t count = std::min(kBlock, logits.vocab - begin);
    const float* block = read_block(kernels, logits, row, begin, count, -HUGE_VALF, buffer);
    if (block != buffer) std::memcpy(buffer, block, count * sizeof(float));
    for (; id != sorted_ids.end() && *id < begin + count; ++id)
      if (*id >= begin) buffer[*id - begin] = -HUGE_VALF;
    const float by = scale(temperature);
    total = merge(total, kernels.rows[kFloat32].statistics(buffer, count, by), by);
  }
  return total;
}

void reduce_row(const Kernels& kernels, const RowView& logits, double temperature, const int32_t* token_ids,
                int64_t capacity, Tail wanted, const ReducedRow& results, int64_t row) {
  const int32_t* ids = token_ids + row * capacity;
  Statistics tail;
  if (wanted == Tail::kSummed) {
    std::vector<int32_t> sorted(ids, ids + capacity);
    std::sort(sorted.begin(), sorted.end());
    tail = tail_statistics(kernels, logits, temperature, sorted, row);
  } else if (wanted == Tail::kChecked) {
    const double sum = statistics_of(kernels, logits, row, scale(temperature)).sum;
    tail.sum = sum - sum;
  }
  const bool valid = tail.sum == tail.sum;
  const double log_sum = log_of_sum(tail.sum);
  auto listed = [&](int64_t i) {
    return 0 <= ids[i] && ids[i] < logits.vocab ? double(element(logits, row, ids[i])) : kNaN;
  };
  double top = tail.max;
  for (int64_t i = 0; i < capacity; ++i) top = std::fmax(top, listed(i));
  float* entries = results.entries + row * (capacity + 1);
  for (int64_t i = 0; i < capacity; ++i)
    entries[i] = static_cast<float>(valid ? (listed(i) - top) / temperature : kNaN);
  entries[capacity] = static_cast<float>((tail.max - top) / temperature + log_sum);
  results.tail_max[row] = tail.max;
  results.tail_log_sum[row] = log_sum;
}

void information_of_row(const Kernels& kernels, const RowView& student, const std::vector<RowView>& teachers,
                        double temperature, const InformationNormalisers& known, const InformationResults& results,
                        int64_t row) {
  const int64_t samples = teachers.size();
  const float by = scale(temperature);
  auto softmax_of = [&](const RowView& logits, int64_t sample) -> LogSoftmax {
    const int64_t place = sample * student.rows() + row;
    if (known.log_sums) return {known.maxima[place], static_cast<float>(kLog2E * known.log_sums[place])};
    const Statistics found = statistics_of(kernels, logits, row, by);
    return {found.max, static_cast<float>(kLog2E * log_of_sum(found.sum))};
  };
  const LogSoftmax p = softmax_of(student, 0);
  std::vector<LogSoftmax> softmaxes;
  bool valid = std::isfinite(p.log2_sum);
  for (int64_t r = 0; r < samples; ++r) {
    softmaxes.push_back(softmax_of(teachers[r], r + 1));
    valid &= std::isfinite(softmaxes.back().log2_sum);
  }
  InformationSums sums;
  if (!valid) sums.total = sums.marginal = sums.information = kNaN;
  std::vector<float> buffers((samples + 1) * kSampledBlock);
  std::vector<const float*> blocks(samples);
  for (int64_t begin = 0; valid && begin < student.vocab; begin += kSampledBlock) {
    const int64_t count = std::min(kSampledBlock, student.vocab - begin);
    for (int64_t r = 0; r < samples; ++r)
      blocks[r] = read_block(kernels, teachers[r], row, begin, count, -HUGE_VALF, &buffers[r * kSampledBlock]);
    const float* z = read_block(kernels, student, row, begin, count, -HUGE_VALF, &buffers[samples * kSampledBlock]);
    const InformationSums part = kernels.information(z, p, blocks.data(), softmaxes.data(), samples, padded(count), by);
    sums.total += part.total;
    sums.marginal += part.marginal;
    sums.information += part.information;
  }
  results.total[row] = sums.total;
  results.marginal[row] = sums.marginal;
  results.information[row] = sums.information;
}

}  // namespace

void row_divergence(const Kernels& kernels, const RowView& student, const RowView& teacher,
                    const RowArguments& arguments, const DivergenceOptions& options, const DivergenceNormalisers& known,
                    const DivergenceResults& results, const ParallelFor& parallel_for) {
  auto compute = [&](int64_t row) {
    divergence_of_row(kernels, student, teacher, arguments.temperature_of(row), options, known, results, row);
  };
  for_kept_rows(student, arguments, parallel_for, compute, [&](int64_t row) {
    for (double* each : {results.divergence, results.slope, results.log_sum, results.teacher_log_sum}) each[row] = 0.0;
    results.max[row] = results.teacher_max[row] = 0.0f;
  });
}

void divergence_gradient(const Kernels& kernels, const RowView& student, const RowView& teacher,
                         const RowArguments& arguments, const DivergenceOptions& options,
                         const DivergenceResults& saved, const double* upstream, const RowView& grad,
                         const ParallelFor& parallel_for) {
  advise_huge_pages(grad, student);
  parallel_for(student.rows(), grain(student), [&](int64_t first, int64_t last) {
    alignas(64) float g_buffer[kBlock];
    for (int64_t row = first; row < last; ++row) {
      if (upstream[row] == 0.0 && std::isfinite(saved.log_sum[row] + saved.teacher_log_sum[row])) {
        std::memset(grad.at(row, 0), 0, grad.vocab * grad.element_size());
        continue;
      }
      const double temperature = arguments.temperature_of(row);
      DivergenceCoefficients c = coefficients(options, temperature, saved, row);
      c.slope = static_cast<float>(saved.slope[row]);
      c.on = static_cast<float>(upstream[row] / temperature);
      for_blocks(kernels, student, teacher, row, [&](const float* z, const float* other, int64_t begin, int64_t count) {
        float* g = block_target(grad, row, begin, count, g_buffer);
        kernels.divergence_gradient(z, other, g, padded(count), c);
        write_block(kernels, grad, row, begin, count, g);
      });
    }
  });
}

void reduced_rows(const Kernels& kernels, const RowView& logits, const RowArguments& arguments,
                  const int32_t* token_ids, int64_t capacity, Tail tail, const ReducedRow& results,
                  const ParallelFor& parallel_for) {
  auto compute = [&](int64_t row) {
    reduce_row(kernels, logits, arguments.temperature_of(row), token_ids, capacity, tail, results, row);
  };
  for_kept_rows(logits, arguments, parallel_for, compute, [&](int64_t row) {
    std::fill_n(results.entries + row * (capacity + 1), capacity + 1, 0.0f);
    results.tail_max[row] = results.tail_log_sum[row] = 0.0f;
  });
}

void reduced_gradient(const Kernels& kernels, const RowView& student, const RowArguments& arguments,
                      const int32_t* token_ids, int64_t capacity, const ReducedRow& saved, const float* upstream,
                      const RowView& grad, const ParallelFor& parallel_for) {
  advise_huge_pages(grad, student);
  parallel_for(student.rows(), grain(student), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const double temperature = arguments.temperature_of(row);
      const float* entries = upstream + row * (capacity + 1);
      // A row whose gradient is NaN has it in every entry, and so in the first.
      const float on_tail = entries[capacity] + (entries[0] - entries[0]);
      if (on_tail == 0.0f || (saved.tail_log_sum[row] == -HUGE_VAL && on_tail == on_tail))
        std::memset(grad.at(row, 0), 0, grad.vocab * grad.element_size());
      else
        kernels.rows[student.dtype].gradient(
            student.at(row, 0), grad.at(row, 0), student.vocab,
            {saved.tail_max[row], scale(temperature), static_cast<float>(kLog2E * saved.tail_log_sum[row]),
             static_cast<float>(on_tail / temperature), 0.0f});
      for (int64_t i = 0; i < capacity; ++i) {
        const int64_t id = token_ids[row * capacity + i];
        if (0 <= id && id < student.vocab) set_element(grad, row, id, static_cast<float>(entries[i] / temperature));
      }
    }
  });
}

void row_information(const Kernels& kernels, const RowView& student, const std::vector<RowView>& teachers,
                     const RowArguments& arguments, const InformationNormalisers& known,
                     const InformationResults& results, const ParallelFor& parallel_for) {
  auto compute = [&](int64_t row) {
    information_of_row(kernels, student, teachers, arguments.temperature_of(row), known, results, row);
  };
  for_kept_rows(student, arguments, parallel_for, compute,
                [&](int64_t row) { results.total[row] = results.marginal[row] = results.information[row] = 0.0; });
}

}  // namespace sdkernels
