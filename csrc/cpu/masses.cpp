// Of each row the number and the mass of the logits that are not below its pivots.
#include <limits>

#include "blocks.h"

namespace sdkernels {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void masses_of_row(const Kernels& kernels, const RowView& logits, double temperature, const float* max,
                   const float* pivots, int64_t number, const MassResults& results, int64_t row) {
  std::vector<Masses> totals(number);
  alignas(64) float buffer[kMassesBlock];
  for (int64_t begin = 0; begin < logits.vocab; begin += kMassesBlock) {
    const int64_t count = std::min(kMassesBlock, logits.vocab - begin);
    // The padding is NaN: it is above no pivot, not even -inf.
    const float* block = read_block(kernels, logits, row, begin, count, kNaN, buffer);
    kernels.masses(block, padded(count), max[row], scale(temperature), pivots + row * number, number, totals.data());
  }
  const double invalid = max[row] - max[row];  // 0, or NaN
  for (int64_t g = 0; g < number; ++g) {
    results.counts[row * number + g] = totals[g].count;
    results.masses[row * number + g] = totals[g].mass + invalid;
    results.moments[row * number + g] = totals[g].moment * kLn2 + invalid;
  }
}

}  // namespace

void row_masses(const Kernels& kernels, const RowView& logits, const RowArguments& arguments, const float* max,
                const float* pivots, int64_t number, const MassResults& results, const ParallelFor& parallel_for) {
  auto compute = [&](int64_t row) {
    masses_of_row(kernels, logits, arguments.temperature_of(row), max, pivots, number, results, row);
  };
  for_kept_rows(logits, arguments, parallel_for, compute, [&](int64_t row) {
    std::fill_n(results.counts + row * number, number, 0);
    std::fill_n(results.masses + row * number, number, 0.0);
    std::fill_n(results.moments + row * number, number, 0.0);
  });
}

}  // namespace sdkernels
