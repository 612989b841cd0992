// The operators of csrc for PyTorch, on its stable ABI. They fill tensors that Python allocated and checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "cpu/launch.h"

namespace {

using sdkernels::RowArguments;
using sdkernels::RowResults;
using sdkernels::RowView;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

RowView row_view(const Tensor& logits) {
  const int64_t leading = logits.dim() - 1;
  STD_TORCH_CHECK(0 <= leading && leading <= 3, "logits must have 1 to 4 dimensions");
  STD_TORCH_CHECK(logits.stride(leading) == 1 || logits.size(leading) == 1, "the vocabulary must be adjacent in memory");
  RowView view{static_cast<char*>(logits.data_ptr()), sdkernels::kFloat32, {1, 1, 1}, {0, 0, 0}, logits.size(leading)};
  switch (logits.scalar_type()) {
    case ScalarType::Float: view.dtype = sdkernels::kFloat32; break;
    case ScalarType::BFloat16: view.dtype = sdkernels::kBFloat16; break;
    case ScalarType::Half: view.dtype = sdkernels::kFloat16; break;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
  for (int64_t i = 0; i < leading; ++i) {
    view.sizes[3 - leading + i] = logits.size(i);
    view.strides[3 - leading + i] = logits.stride(i);
  }
  return view;
}

template <class T>
T* vector_of(const Tensor& tensor, ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == count,
                  "per-token tensors must be contiguous, of the expected dtype and number");
  return static_cast<T*>(tensor.data_ptr());
}

float* floats(const Tensor& tensor, int64_t count) { return vector_of<float>(tensor, ScalarType::Float, count); }

double* doubles(const Tensor& tensor, int64_t count) { return vector_of<double>(tensor, ScalarType::Double, count); }

const float* floats(const std::optional<Tensor>& tensor, int64_t count) {
  return tensor ? floats(*tensor, count) : nullptr;
}

RowArguments row_arguments(const RowView& view, const Tensor& token_ids, const std::optional<Tensor>& mask,
                           double temperature, const std::optional<Tensor>& temperatures) {
  const int64_t rows = view.rows();
  const int64_t values = temperatures ? temperatures->numel() : 1;
  STD_TORCH_CHECK(rows == 0 || (values > 0 && rows % values == 0), "temperatures must divide the tokens");
  return {vector_of<int64_t>(token_ids, ScalarType::Long, rows),
          mask ? vector_of<bool>(*mask, ScalarType::Bool, rows) : nullptr,
          temperature,
          temperatures ? doubles(*temperatures, values) : nullptr,
          rows / std::max<int64_t>(values, 1)};
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

const sdkernels::Kernels& kernels_for(const std::string& instruction_set) {
  const sdkernels::Kernels* found = sdkernels::find_kernels(instruction_set);
  STD_TORCH_CHECK(found, "this processor has no ", instruction_set);
  return *found;
}

void row_statistics(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, double temperature,
                    std::optional<Tensor> temperatures, Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum,
                    std::string instruction_set) {
  const RowView view = row_view(logits);
  const int64_t rows = view.rows();
  sdkernels::row_statistics(kernels_for(instruction_set), view,
                            row_arguments(view, token_ids, mask, temperature, temperatures),
                            {doubles(log_prob, rows), floats(entropy, rows), floats(max, rows), floats(log_sum, rows)},
                            parallel_for, static_cast<int>(torch::stable::get_num_threads()));
}

void row_gradient(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, double temperature,
                  std::optional<Tensor> temperatures, Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum,
                  Tensor grad_log_prob, std::optional<Tensor> grad_entropy, Tensor grad,
                  std::string instruction_set) {
  const RowView view = row_view(logits);
  const RowView target = row_view(grad);
  const int64_t rows = view.rows();
  STD_TORCH_CHECK(target.rows() == rows && target.vocab == view.vocab && target.dtype == view.dtype,
                  "the gradient must have the logits' shape and dtype");
  sdkernels::row_gradient(kernels_for(instruction_set), view,
                          row_arguments(view, token_ids, mask, temperature, temperatures),
                          {doubles(log_prob, rows), floats(entropy, rows), floats(max, rows), floats(log_sum, rows)},
                          {floats(grad_log_prob, rows), floats(grad_entropy, rows)}, target, parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY(sdkernels_cpu, m) {
  m.def("instruction_sets() -> str");
  m.def(
      "row_statistics(Tensor logits, Tensor token_ids, Tensor? mask, float temperature, Tensor? temperatures, "
      "Tensor(a!) log_prob, Tensor(b!) entropy, Tensor(c!) max, Tensor(d!) log_sum, str instruction_set='') -> ()");
  m.def(
      "row_gradient(Tensor logits, Tensor token_ids, Tensor? mask, float temperature, Tensor? temperatures, "
      "Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum, Tensor grad_log_prob, Tensor? grad_entropy, "
      "Tensor(a!) grad, str instruction_set='') -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdkernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&sdkernels::instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(sdkernels_cpu, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics));
  m.impl("row_gradient", TORCH_BOX(&row_gradient));
}
