// Whole tensors of rows, still without a framework: views in, one result per row out.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "rows_abi.h"

namespace sdkernels {

// Up to three leading dimensions of rows whose elements are adjacent; strides count elements.
struct RowView {
  char* data;
  Dtype dtype;
  int64_t sizes[3], strides[3];
  int64_t vocab;

  int64_t rows() const { return sizes[0] * sizes[1] * sizes[2]; }
  int64_t element_size() const { return dtype == kFloat32 ? 4 : 2; }
  char* at(int64_t row, int64_t column) const;
};

struct RowArguments {
  const int64_t* token_ids;
  const bool* mask;            // null: every row is kept
  double temperature;          // used where temperatures is null
  const double* temperatures;  // one for each `span` consecutive rows
  int64_t span;

  bool keeps(int64_t row) const { return token_ids[row] != -100 && (!mask || mask[row]); }
  double temperature_of(int64_t row) const { return temperatures ? temperatures[row / span] : temperature; }
};

struct RowResults {
  double* log_prob;  // as a float, one of -16 would be off by 1e-6, and so would be the ratio that exp makes of it
  float *entropy, *max, *log_sum;
};

struct UpstreamGradients {
  const float* log_prob;
  const float* entropy;  // null: zero
};

// Calls body(begin, end) on parts of [0, count), at least `grain` long each, in parallel.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

// The names of the instruction sets that this processor can run, best first.
std::string instruction_sets();

// The kernels of one instruction set by its name; "" is the best. Null if this processor cannot run it.
const Kernels* find_kernels(const std::string& name);

void row_statistics(const Kernels&, const RowView& logits, const RowArguments&, const RowResults&, const ParallelFor&, int threads);
void row_gradient(const Kernels&, const RowView& logits, const RowArguments&, const RowResults& saved,
                  const UpstreamGradients&, const RowView& grad, const ParallelFor&);

}  // namespace sdkernels
