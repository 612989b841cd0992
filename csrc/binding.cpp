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
  STD_TORCH_CHECK(logits.stride(leading) == 1 || logits.size(leading) == 1,
                  "the vocabulary must be adjacent in memory");
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

RowArguments row_arguments(const RowView& view, const std::optional<Tensor>& token_ids,
                           const std::optional<Tensor>& mask, double temperature,
                           const std::optional<Tensor>& temperatures) {
  const int64_t rows = view.rows();
  const int64_t values = temperatures ? temperatures->numel() : 1;
  STD_TORCH_CHECK(rows == 0 || (values > 0 && rows % values == 0), "temperatures must divide the tokens");
  return {token_ids ? vector_of<int64_t>(*token_ids, ScalarType::Long, rows) : nullptr,
          mask ? vector_of<bool>(*mask, ScalarType::Bool, rows) : nullptr, temperature,
          temperatures ? doubles(*temperatures, values) : nullptr, rows / std::max<int64_t>(values, 1)};
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
                  Tensor grad_log_prob, std::optional<Tensor> grad_entropy, Tensor grad, std::string instruction_set) {
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

int64_t capacity_of(const Tensor& lists, int64_t rows) { return rows == 0 ? 0 : lists.numel() / rows; }

void row_support(Tensor logits, std::optional<Tensor> mask, double temperature, std::optional<Tensor> temperatures,
                 int64_t top_k, double top_p, double min_p, bool partial, Tensor threshold, Tensor size, Tensor max,
                 Tensor log_sum, Tensor entropy, Tensor token_ids, Tensor log_probs, std::string instruction_set) {
  const RowView view = row_view(logits);
  const int64_t rows = view.rows(), capacity = capacity_of(token_ids, rows);
  sdkernels::row_support(
      kernels_for(instruction_set), view, row_arguments(view, std::nullopt, mask, temperature, temperatures),
      {top_k, top_p, min_p}, capacity, partial,
      {floats(threshold, rows), vector_of<int64_t>(size, ScalarType::Long, rows), floats(max, rows),
       doubles(log_sum, rows), floats(entropy, rows), vector_of<int32_t>(token_ids, ScalarType::Int, rows * capacity),
       floats(log_probs, rows * capacity)},
      parallel_for);
}

sdkernels::Supports supports_of(int64_t rows, const Tensor& threshold, const Tensor& size, const Tensor& max,
                                const Tensor& log_sum, const Tensor& entropy, const Tensor& token_ids,
                                const Tensor& log_probs) {
  const int64_t capacity = capacity_of(token_ids, rows);
  return {floats(threshold, rows),
          vector_of<int64_t>(size, ScalarType::Long, rows),
          floats(max, rows),
          doubles(log_sum, rows),
          floats(entropy, rows),
          vector_of<int32_t>(token_ids, ScalarType::Int, rows * capacity),
          floats(log_probs, rows * capacity),
          capacity};
}

RowView view_like(const Tensor& tensor, const RowView& like) {
  const RowView view = row_view(tensor);
  STD_TORCH_CHECK(view.rows() == like.rows() && view.vocab == like.vocab, "rows of a pair must have the same shape");
  return view;
}

void truncated_log_softmax(Tensor logits, double temperature, std::optional<Tensor> temperatures, Tensor threshold,
                           Tensor size, Tensor max, Tensor log_sum, Tensor entropy, Tensor token_ids, Tensor log_probs,
                           Tensor result, std::string instruction_set) {
  const RowView view = row_view(logits);
  sdkernels::truncated_log_softmax(
      kernels_for(instruction_set), view, row_arguments(view, std::nullopt, std::nullopt, temperature, temperatures),
      supports_of(view.rows(), threshold, size, max, log_sum, entropy, token_ids, log_probs), view_like(result, view),
      parallel_for);
}

void truncated_gradient(Tensor logits, std::optional<Tensor> upstream, std::optional<Tensor> label_ids,
                        std::optional<Tensor> on_label, std::optional<Tensor> on_entropy, double temperature,
                        std::optional<Tensor> temperatures, Tensor threshold, Tensor size, Tensor max, Tensor log_sum,
                        Tensor entropy, Tensor token_ids, Tensor log_probs, Tensor grad, std::string instruction_set) {
  const RowView view = row_view(logits);
  const int64_t rows = view.rows();
  const RowView on_log_q = upstream ? view_like(*upstream, view) : RowView{};
  sdkernels::truncated_gradient(
      kernels_for(instruction_set), view, row_arguments(view, std::nullopt, std::nullopt, temperature, temperatures),
      supports_of(rows, threshold, size, max, log_sum, entropy, token_ids, log_probs),
      {upstream ? &on_log_q : nullptr, label_ids ? vector_of<int64_t>(*label_ids, ScalarType::Long, rows) : nullptr,
       floats(on_label, rows), floats(on_entropy, rows)},
      view_like(grad, view), parallel_for);
}

sdkernels::Pair pair_of(int64_t rows, const RowView* base, const std::optional<Tensor>& threshold,
                        const std::optional<Tensor>& size, const std::optional<Tensor>& token_ids,
                        const std::optional<Tensor>& log_probs) {
  STD_TORCH_CHECK(base || token_ids, "a pair needs a base or lists");
  const int64_t capacity = token_ids ? capacity_of(*token_ids, rows) : 0;
  return {base,
          floats(threshold, rows),
          size ? vector_of<int64_t>(*size, ScalarType::Long, rows) : nullptr,
          token_ids ? vector_of<int32_t>(*token_ids, ScalarType::Int, rows * capacity) : nullptr,
          floats(log_probs, rows * capacity),
          capacity};
}

sdkernels::PairResults pair_results(int64_t rows, const Tensor& lse, const Tensor& support_lse,
                                    const Tensor& tempered_lse, const Tensor& cross, const Tensor& negentropy,
                                    const Tensor& size, const Tensor& log_sum, const Tensor& base_log_sum,
                                    const Tensor& max, const Tensor& support_max, const Tensor& base_max) {
  return {doubles(lse, rows),        doubles(support_lse, rows),  doubles(tempered_lse, rows),
          doubles(cross, rows),      doubles(negentropy, rows),   vector_of<int64_t>(size, ScalarType::Long, rows),
          doubles(log_sum, rows),    doubles(base_log_sum, rows), floats(max, rows),
          floats(support_max, rows), floats(base_max, rows)};
}

void pair_statistics(Tensor student, std::optional<Tensor> base, std::optional<Tensor> mask, double temperature,
                     std::optional<Tensor> temperatures, std::optional<Tensor> threshold, std::optional<Tensor> size,
                     std::optional<Tensor> token_ids, std::optional<Tensor> log_probs, Tensor lse, Tensor support_lse,
                     Tensor tempered_lse, Tensor cross, Tensor negentropy, Tensor support_size, Tensor log_sum,
                     Tensor base_log_sum, Tensor max, Tensor support_max, Tensor base_max,
                     std::string instruction_set) {
  const RowView view = row_view(student);
  const int64_t rows = view.rows();
  const RowView base_view = base ? view_like(*base, view) : RowView{};
  sdkernels::pair_statistics(kernels_for(instruction_set), view,
                             row_arguments(view, std::nullopt, mask, temperature, temperatures),
                             pair_of(rows, base ? &base_view : nullptr, threshold, size, token_ids, log_probs),
                             pair_results(rows, lse, support_lse, tempered_lse, cross, negentropy, support_size,
                                          log_sum, base_log_sum, max, support_max, base_max),
                             parallel_for);
}

void pair_gradient(Tensor student, std::optional<Tensor> base, double temperature, std::optional<Tensor> temperatures,
                   std::optional<Tensor> threshold, std::optional<Tensor> size, std::optional<Tensor> token_ids,
                   std::optional<Tensor> log_probs, Tensor lse, Tensor support_lse, Tensor tempered_lse, Tensor cross,
                   Tensor negentropy, Tensor support_size, Tensor log_sum, Tensor base_log_sum, Tensor max,
                   Tensor support_max, Tensor base_max, Tensor on_lse, Tensor on_support_lse, Tensor on_tempered_lse,
                   Tensor on_cross, Tensor grad, std::string instruction_set) {
  const RowView view = row_view(student);
  const int64_t rows = view.rows();
  const RowView base_view = base ? view_like(*base, view) : RowView{};
  sdkernels::pair_gradient(
      kernels_for(instruction_set), view, row_arguments(view, std::nullopt, std::nullopt, temperature, temperatures),
      pair_of(rows, base ? &base_view : nullptr, threshold, size, token_ids, log_probs),
      pair_results(rows, lse, support_lse, tempered_lse, cross, negentropy, support_size, log_sum, base_log_sum, max,
                   support_max, base_max),
      {doubles(on_lse, rows), doubles(on_support_lse, rows), doubles(on_tempered_lse, rows), doubles(on_cross, rows)},
      view_like(grad, view), parallel_for);
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
  m.def(
      "row_support(Tensor logits, Tensor? mask, float temperature, Tensor? temperatures, int top_k, float top_p, "
      "float min_p, bool partial, Tensor(a!) threshold, Tensor(b!) size, Tensor(c!) max, Tensor(d!) log_sum, "
      "Tensor(e!) entropy, Tensor(f!) token_ids, Tensor(g!) log_probs, str instruction_set='') -> ()");
  m.def(
      "truncated_log_softmax(Tensor logits, float temperature, Tensor? temperatures, Tensor threshold, Tensor size, "
      "Tensor max, Tensor log_sum, Tensor entropy, Tensor token_ids, Tensor log_probs, Tensor(a!) result, "
      "str instruction_set='') -> ()");
  m.def(
      "truncated_gradient(Tensor logits, Tensor? upstream, Tensor? label_ids, Tensor? on_label, Tensor? on_entropy, "
      "float temperature, Tensor? temperatures, Tensor threshold, Tensor size, Tensor max, Tensor log_sum, "
      "Tensor entropy, Tensor token_ids, Tensor log_probs, Tensor(a!) grad, str instruction_set='') -> ()");
  m.def(
      "pair_statistics(Tensor student, Tensor? base, Tensor? mask, float temperature, Tensor? temperatures, "
      "Tensor? threshold, Tensor? size, Tensor? token_ids, Tensor? log_probs, Tensor(a!) lse, Tensor(b!) support_lse, "
      "Tensor(c!) tempered_lse, Tensor(d!) cross, Tensor(e!) negentropy, Tensor(f!) support_size, "
      "Tensor(g!) log_sum, Tensor(h!) base_log_sum, Tensor(i!) max, Tensor(j!) support_max, Tensor(k!) base_max, "
      "str instruction_set='') -> ()");
  m.def(
      "pair_gradient(Tensor student, Tensor? base, float temperature, Tensor? temperatures, Tensor? threshold, "
      "Tensor? size, Tensor? token_ids, Tensor? log_probs, Tensor lse, Tensor support_lse, Tensor tempered_lse, "
      "Tensor cross, Tensor negentropy, Tensor support_size, Tensor log_sum, Tensor base_log_sum, Tensor max, "
      "Tensor support_max, Tensor base_max, Tensor on_lse, Tensor on_support_lse, Tensor on_tempered_lse, "
      "Tensor on_cross, Tensor(a!) grad, str instruction_set='') -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdkernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&sdkernels::instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(sdkernels_cpu, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics));
  m.impl("row_gradient", TORCH_BOX(&row_gradient));
  m.impl("row_support", TORCH_BOX(&row_support));
  m.impl("truncated_log_softmax", TORCH_BOX(&truncated_log_softmax));
  m.impl("truncated_gradient", TORCH_BOX(&truncated_gradient));
  m.impl("pair_statistics", TORCH_BOX(&pair_statistics));
  m.impl("pair_gradient", TORCH_BOX(&pair_gradient));
}
