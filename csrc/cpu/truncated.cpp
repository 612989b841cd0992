// What truncated rows give back: log q written out, and the gradient of logits through log q.
#include <cmath>
#include <cstring>
#include <limits>

#include "blocks.h"

namespace sdkernels {
namespace {

SupportCoefficients coefficients(const RowArguments& arguments, const Supports& supports, int64_t row) {
  SupportCoefficients c{};
  c.threshold = supports.threshold[row];
  c.max = supports.max[row];
  c.inverse = static_cast<float>(std::clamp(1.0 / arguments.temperature_of(row), 1e-37, 3e38));
  c.log_sum = static_cast<float>(supports.log_sum[row]);
  c.scale = scale(arguments.temperature_of(row));
  c.log2_sum = static_cast<float>(kLog2E * supports.log_sum[row]);
  return c;
}

void fill_row(const RowView& view, int64_t row, float value) {
  char* target = view.at(row, 0);
  if (view.dtype == kFloat32) {
    std::fill_n(reinterpret_cast<float*>(target), view.vocab, value);
  } else {
    const uint16_t bits = view.dtype == kBFloat16 ? to_bfloat16(value).bits : to_float16(value).bits;
    std::fill_n(reinterpret_cast<uint16_t*>(target), view.vocab, bits);
  }
}

// sum_S u of the upstream gradient of log q.
double upstream_sum(const Kernels& kernels, const RowView& logits, const RowView& upstream, const Supports& supports,
                    int64_t row) {
  double total = 0.0;
  if (supports.listed(row)) {
    const int32_t* ids = supports.token_ids + row * supports.capacity;
    for (int64_t i = 0; i < supports.size[row]; ++i) total += element(upstream, row, ids[i]);
    return total;
  }
  alignas(64) float z_buffer[kBlock], u_buffer[kBlock];
  for (int64_t begin = 0; begin < logits.vocab; begin += kBlock) {
    const int64_t count = std::min(kBlock, logits.vocab - begin);
    const float* z = read_block(kernels, logits, row, begin, count, -HUGE_VALF, z_buffer);
    const float* u = read_block(kernels, upstream, row, begin, count, 0.0f, u_buffer);
    total += kernels.sum_inside(z, u, padded(count), supports.threshold[row]);
  }
  return total;
}

void gradient_of_row(const Kernels& kernels, const RowView& logits, const RowArguments& arguments,
                     const Supports& supports, const SupportUpstream& upstream, const RowView& grad, int64_t row) {
  const bool exists = supports.size[row] > 0;
  if (!exists) {
    fill_row(grad, row, static_cast<float>(0.0 * supports.log_sum[row]));  // NaN where the row has no distribution
    return;
  }
  const double inverse = 1.0 / arguments.temperature_of(row);
  const double through_q = upstream.log_q ? upstream_sum(kernels, logits, *upstream.log_q, supports, row) : 0.0;
  const double on_label = upstream.on_label ? upstream.on_label[row] : 0.0;
  const double on_entropy = upstream.on_entropy ? upstream.on_entropy[row] : 0.0;
  const double slope =
      -inverse * (through_q + on_label + (on_entropy == 0.0 ? 0.0 : on_entropy * supports.entropy[row]));
  const double entropy_slope = -inverse * on_entropy;
  auto entry = [&](int64_t id, double log_q) {
    const double through_entropy = entropy_slope == 0.0 ? 0.0 : entropy_slope * std::max<double>(log_q, kFloor);
    double g = std::exp(log_q) * (slope + through_entropy);
    if (upstream.log_q) g += inverse * element(*upstream.log_q, row, id);
    if (upstream.label_ids && id == upstream.label_ids[row]) g += inverse * on_label;
    set_element(grad, row, id, static_cast<float>(g));
  };
  if (supports.listed(row)) {
    std::memset(grad.at(row, 0), 0, grad.vocab * grad.element_size());
    for (int64_t i = row * supports.capacity; i < row * supports.capacity + supports.size[row]; ++i)
      entry(supports.token_ids[i], supports.log_probs[i]);
    return;
  }
  SupportCoefficients c = coefficients(arguments, supports, row);
  c.slope = static_cast<float>(slope);
  c.entropy_slope = static_cast<float>(entropy_slope / kLog2E);
  alignas(64) float z_buffer[kBlock], u_buffer[kBlock], g_buffer[kBlock];
  for (int64_t begin = 0; begin < logits.vocab; begin += kBlock) {
    const int64_t count = std::min(kBlock, logits.vocab - begin);
    const float* z = read_block(kernels, logits, row, begin, count, -HUGE_VALF, z_buffer);
    const float* u = upstream.log_q ? read_block(kernels, *upstream.log_q, row, begin, count, 0.0f, u_buffer) : nullptr;
    float* g = block_target(grad, row, begin, count, g_buffer);
    kernels.support_gradient(z, u, g, padded(count), c);
    write_block(kernels, grad, row, begin, count, g);
  }
  if (on_label == 0.0) return;
  const int64_t label = upstream.label_ids[row];
  if (label < 0 || label >= logits.vocab) return;  // it is in another shard of the vocabulary
  entry(label, (double(element(logits, row, label)) - c.max) * inverse - supports.log_sum[row]);
}

}  // namespace

void truncated_log_softmax(const Kernels& kernels, const RowView& logits, const RowArguments& arguments,
                           const Supports& supports, const RowView& result, const ParallelFor& parallel_for) {
  advise_huge_pages(result, logits);
  parallel_for(logits.rows(), grain(logits), [&](int64_t first, int64_t last) {
    alignas(64) float z_buffer[kBlock], buffer[kBlock];
    for (int64_t row = first; row < last; ++row) {
      if (supports.listed(row)) {
        fill_row(result, row, static_cast<float>(0.0 * supports.log_sum[row] - HUGE_VAL));
        for (int64_t i = row * supports.capacity; i < row * supports.capacity + supports.size[row]; ++i)
          set_element(result, row, supports.token_ids[i], supports.log_probs[i]);
        continue;
      }
      const SupportCoefficients c = coefficients(arguments, supports, row);
      for (int64_t begin = 0; begin < logits.vocab; begin += kBlock) {
        const int64_t count = std::min(kBlock, logits.vocab - begin);
        const float* z = read_block(kernels, logits, row, begin, count, -HUGE_VALF, z_buffer);
        float* target = block_target(result, row, begin, count, buffer);
        kernels.log_softmax(z, target, padded(count), c);
        write_block(kernels, result, row, begin, count, target);
      }
    }
  });
}

void truncated_gradient(const Kernels& kernels, const RowView& logits, const RowArguments& arguments,
                        const Supports& supports, const SupportUpstream& upstream, const RowView& grad,
                        const ParallelFor& parallel_for) {
  advise_huge_pages(grad, logits);
  parallel_for(logits.rows(), grain(logits), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      gradient_of_row(kernels, logits, arguments, supports, upstream, grad, row);
  });
}

}  // namespace sdkernels
