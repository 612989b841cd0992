// The student's sums over V and, with q of the base, over its support; and the gradient of both.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "blocks.h"

namespace sdkernels {
namespace {

PairScales scales(const RowArguments& arguments, const Pair& pair, int64_t row) {
  return {scale(1.0), scale(arguments.temperature_of(row)), pair.threshold ? pair.threshold[row] : kLowest};
}

bool is_listed(const Pair& pair, int64_t place) {
  return pair.token_ids[place] >= 0 && pair.log_probs[place] != -HUGE_VALF;
}

// An id outside the vocabulary is never read: it makes the row NaN.
double listed_logit(const RowView& student, int64_t row, int64_t id) {
  return id < student.vocab ? element(student, row, id) : std::numeric_limits<double>::quiet_NaN();
}

PairStatistics listed_statistics(const Kernels& kernels, const RowView& student, const Pair& pair, double temperature,
                                 int64_t row) {
  const Statistics over_row = statistics_of(kernels, student, row, scale(1.0));
  PairStatistics r;
  r.max = over_row.max;
  r.sum = over_row.sum;
  const int64_t begin = row * pair.capacity, end = begin + pair.capacity;
  for (int64_t i = begin; i < end; ++i)
    if (is_listed(pair, i)) r.support_max = std::fmax(r.support_max, listed_logit(student, row, pair.token_ids[i]));
  for (int64_t i = begin; i < end; ++i) {
    if (!is_listed(pair, i)) continue;
    const double centred = listed_logit(student, row, pair.token_ids[i]) - r.support_max;
    const double log_q = pair.log_probs[i], q = std::exp(log_q);
    r.support_sum += std::exp(centred);
    r.tempered_sum += std::exp(centred / temperature);
    r.base_sum += q;
    r.impossible |= centred == -HUGE_VAL;
    if (q > 0.0) r.base_weighted += q * log_q;
    if (q > 0.0 && centred != -HUGE_VAL) r.cross += q * centred;
    ++r.size;
  }
  return r;
}

PairStatistics dense_statistics(const Kernels& kernels, const RowView& student, const RowView& base,
                                const PairScales& c, int64_t row) {
  alignas(64) float z_buffer[kBlock], b_buffer[kBlock];
  PairStatistics total;
  for (int64_t begin = 0; begin < student.vocab; begin += kBlock) {
    const int64_t count = std::min(kBlock, student.vocab - begin);
    const float* z = read_block(kernels, student, row, begin, count, -HUGE_VALF, z_buffer);
    const float* b = read_block(kernels, base, row, begin, count, -HUGE_VALF, b_buffer);
    total = merge(total, kernels.pair_statistics(z, b, padded(count), c), c);
  }
  return total;
}

void finish_row(const PairStatistics& r, bool listed, double temperature, int64_t row, const PairResults& results) {
  // A maximum adds 1 to its sum, unless every logit is -inf or one is NaN or inf.
  const bool valid = r.sum >= 0.5 && r.size > 0 && r.base_sum == r.base_sum && r.support_sum == r.support_sum;
  const double invalid = valid ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  const double base_log_sum = listed ? 0.0 : std::log(r.base_sum);
  const double log_sum = std::log(r.sum);
  results.lse[row] = (double(r.max) - r.support_max) + log_sum + invalid;
  results.support_lse[row] = std::log(r.support_sum) + invalid;
  results.tempered_lse[row] = temperature * std::log(r.tempered_sum) + invalid;
  results.cross[row] = (r.impossible ? -HUGE_VAL : r.cross / (listed ? 1.0 : r.base_sum)) + invalid;
  results.negentropy[row] =
      (listed ? r.base_weighted : r.base_weighted / (kLog2E * r.base_sum) - base_log_sum) + invalid;
  results.size[row] = r.size;
  results.log_sum[row] = log_sum + invalid;
  results.base_log_sum[row] = base_log_sum;
  results.max[row] = r.max;
  results.support_max[row] = r.support_max;
  results.base_max[row] = r.base_max;
}

void set_zero(int64_t row, const PairResults& results) {
  for (double* each : {results.lse, results.support_lse, results.tempered_lse, results.cross, results.negentropy,
                       results.log_sum, results.base_log_sum})
    each[row] = 0.0;
  for (float* each : {results.max, results.support_max, results.base_max}) each[row] = 0.0f;
  results.size[row] = 0;
}

void listed_gradient(const Kernels& kernels, const RowView& student, const Pair& pair, const PairCoefficients& c,
                     const RowView& grad, int64_t row, std::vector<double>& logits) {
  const int64_t begin = row * pair.capacity;
  // Read first: in place, the gradient overwrites them.
  for (int64_t i = 0; i < pair.capacity; ++i) {
    const int64_t id = pair.token_ids[begin + i];
    if (0 <= id && id < student.vocab) logits[i] = element(student, row, id);
  }
  if (c.on_p == 0.0f && c.log2_sum == c.log2_sum)
    std::memset(grad.at(row, 0), 0, grad.vocab * grad.element_size());
  else
    kernels.rows[student.dtype].gradient(student.at(row, 0), grad.at(row, 0), student.vocab,
                                         {c.max, c.scales.student, c.log2_sum, c.on_p, 0.0f});
  for (int64_t i = 0; i < pair.capacity; ++i) {
    const int64_t id = pair.token_ids[begin + i];
    if (!is_listed(pair, begin + i) || id >= student.vocab) continue;
    const double z = logits[i], centred = z - c.support_max;
    const double g = c.on_p * std::exp2((z - c.max) * c.scales.student - c.log2_sum) +
                     c.on_support_p * std::exp2(centred * c.scales.student - c.support_log2_sum) +
                     c.on_tempered_p * std::exp2(centred * c.scales.tempered - c.tempered_log2_sum) +
                     c.on_q * std::exp(pair.log_probs[begin + i]);
    set_element(grad, row, id, static_cast<float>(g));
  }
}

void dense_gradient(const Kernels& kernels, const RowView& student, const RowView& base, const PairCoefficients& c,
                    const RowView& grad, int64_t row) {
  alignas(64) float z_buffer[kBlock], b_buffer[kBlock], g_buffer[kBlock];
  for (int64_t begin = 0; begin < student.vocab; begin += kBlock) {
    const int64_t count = std::min(kBlock, student.vocab - begin);
    const float* z = read_block(kernels, student, row, begin, count, -HUGE_VALF, z_buffer);
    const float* b = read_block(kernels, base, row, begin, count, -HUGE_VALF, b_buffer);
    float* g = block_target(grad, row, begin, count, g_buffer);
    kernels.pair_gradient(z, b, g, padded(count), c);
    write_block(kernels, grad, row, begin, count, g);
  }
}

}  // namespace

void pair_statistics(const Kernels& kernels, const RowView& student, const RowArguments& arguments, const Pair& pair,
                     const PairResults& results, const ParallelFor& parallel_for) {
  auto compute = [&](int64_t row) {
    const double temperature = arguments.temperature_of(row);
    const bool listed = pair.listed(row);
    const PairStatistics r = listed ? listed_statistics(kernels, student, pair, temperature, row)
                                    : dense_statistics(kernels, student, *pair.base, scales(arguments, pair, row), row);
    finish_row(r, listed, temperature, row, results);
  };
  for_kept_rows(student, arguments, parallel_for, compute, [&](int64_t row) { set_zero(row, results); });
}

void pair_gradient(const Kernels& kernels, const RowView& student, const RowArguments& arguments, const Pair& pair,
                   const PairResults& saved, const PairUpstream& upstream, const RowView& grad,
                   const ParallelFor& parallel_for) {
  advise_huge_pages(grad, student);
  parallel_for(student.rows(), grain(student), [&](int64_t first, int64_t last) {
    std::vector<double> listed(pair.capacity);  // before a row is overwritten: there may be no memory
    for (int64_t row = first; row < last; ++row) {
      const double on[] = {upstream.on_lse[row], upstream.on_support_lse[row], upstream.on_tempered_lse[row],
                           upstream.on_cross[row]};
      if (on[0] == 0.0 && on[1] == 0.0 && on[2] == 0.0 && on[3] == 0.0 && saved.log_sum[row] == saved.log_sum[row]) {
        std::memset(grad.at(row, 0), 0, grad.vocab * grad.element_size());
        continue;
      }
      const double temperature = arguments.temperature_of(row);
      PairCoefficients c{};
      c.scales = scales(arguments, pair, row);
      c.max = saved.max[row];
      c.support_max = saved.support_max[row];
      c.base_max = saved.base_max[row];
      c.log2_sum = static_cast<float>(kLog2E * saved.log_sum[row]);
      // Where no gradient flows a distribution may not even exist: then 0 must not meet its NaN.
      if (on[1] != 0.0) c.support_log2_sum = static_cast<float>(kLog2E * saved.support_lse[row]);
      if (on[2] != 0.0) c.tempered_log2_sum = static_cast<float>(kLog2E * saved.tempered_lse[row] / temperature);
      c.base_log2_sum = static_cast<float>(kLog2E * saved.base_log_sum[row]);
      c.on_p = static_cast<float>(on[0]);
      c.on_support_p = static_cast<float>(on[1]);
      c.on_tempered_p = static_cast<float>(on[2]);
      c.on_q = static_cast<float>(on[3]);
      if (pair.listed(row))
        listed_gradient(kernels, student, pair, c, grad, row, listed);
      else
        dense_gradient(kernels, student, *pair.base, c, grad, row);
    }
  });
}

}  // namespace sdkernels
