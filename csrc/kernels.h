// All row algorithms, for one instruction set: included once by each cpu/rows_*.cpp, which set SDK_ISA and SDK_LANES.
#include "cpu/rows_abi.h"

#include <cstring>

#include "vectors.h"
#include "rows.h"
#include "support.h"
#include "divergence.h"
#include "masses.h"

namespace sdkernels {
namespace SDK_ISA {

template <class T>
constexpr RowKernels row_kernels() {
  return {
      [](const void* row, int64_t count, float scale) { return statistics(static_cast<const T*>(row), count, scale); },
      [](const void* row, void* grad, int64_t count, const Coefficients& c) {
        auto* source = static_cast<const T*>(row);
        auto* target = static_cast<T*>(grad);
        if (c.entropy_slope == 0.0f)
          gradient<T, false>(source, target, count, c);
        else
          gradient<T, true>(source, target, count, c);
      },
      [](const void* block, int64_t count, int64_t first_id, float bound, Candidates& found) {
        return collect(static_cast<const T*>(block), count, first_id, bound, found);
      },
      [](const void* row, int64_t count, float bound) {
        return count_at_least(static_cast<const T*>(row), count, bound);
      },
      [](const void* source, float* target, int64_t count) { widen(static_cast<const T*>(source), target, count); },
      [](const float* source, void* target, int64_t count) { narrow(source, static_cast<T*>(target), count); },
  };
}

extern const Kernels kernels;
const Kernels kernels = {
    {row_kernels<float>(), row_kernels<BFloat16>(), row_kernels<Float16>()},
    pair_statistics,
    pair_gradient,
    log_softmax,
    sum_inside,
    support_gradient,
    divergence_sums,
    divergence_entries,
    divergence_gradient,
    information,
    masses,
};

}  // namespace SDK_ISA
}  // namespace sdkernels
