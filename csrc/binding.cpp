// The operators of csrc for PyTorch, on its stable ABI. They fill tensors that Python allocated and checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "cpu/launch.h"

namespace {

using sdkernels::RowArguments;
using sdkernels::RowResults;
using sdkernels::RowView;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Without the first `skipped` dimensions: at their index 0.
RowView row_view(const Tensor& logits, int64_t skipped = 0) {
  const int64_t last = logits.dim() - 1, leading = last - skipped;
  STD_TORCH_CHECK(0 <= leading && leading <= 3, "logits must have 1 to 4 dimensions");
  STD_TORCH_CHECK(logits.stride(last) == 1 || logits.size(last) == 1, "the vocabulary must be adjacent in memory");
  RowView view{static_cast<char*>(logits.data_ptr()), sdkernels::kFloat32, {1, 1, 1}, {0, 0, 0}, logits.size(last)};
  switch (logits.scalar_type()) {
    case ScalarType::Float: view.dtype = sdkernels::kFloat32; break;
    case ScalarType::BFloat16: view.dtype = sdkernels::kBFloat16; break;
    case ScalarType::Half: view.dtype = sdkernels::kFloat16; break;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
  for (int64_t i = 0; i < leading; ++i) {
    view.sizes[3 - leading + i] = logits.size(skipped + i);
    view.strides[3 - leading + i] = logits.stride(skipped + i);
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

const double* doubles(const std::optional<Tensor>& tensor, int64_t count) {
  return tensor ? doubles(*tensor, count) : nullptr;
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

// What a thread throws, as where memory ran out, is thrown again here: torch only says that its call failed.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr thrown;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// The text of an argument. An argument that is a std::string would be copied by torch and never freed: pytorch#191340.
std::string text_of(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  const bool read = !torch_string_length(handle, &length) && !torch_string_c_str(handle, &data);
  STD_TORCH_CHECK(read, "an argument's text cannot be read");
  const std::string text(data, length);
  torch_delete_string(handle);
  return text;
}

const sdkernels::Kernels& kernels_for(StringHandle instruction_set) {
  const std::string name = text_of(instruction_set);
  const sdkernels::Kernels* found = sdkernels::find_kernels(name);
  STD_TORCH_CHECK(found, "this processor has no ", name);
  return *found;
}

void row_statistics(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, double temperature,
                    std::optional<Tensor> temperatures, Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum,
                    StringHandle instruction_set) {
  const RowView view = row_view(logits);
  const int64_t rows = view.rows();
  sdkernels::row_statistics(kernels_for(instruction_set), view,
                            row_arguments(view, token_ids, mask, temperature, temperatures),
                            {doubles(log_prob, rows), floats(entropy, rows), floats(max, rows), floats(log_sum, rows)},
                            parallel_for, static_cast<int>(torch::stable::get_num_threads()));
}

void row_gradient(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, double temperature,
                  std::optional<Tensor> temperatures, Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum,
                  Tensor grad_log_prob, std::optional<Tensor> grad_entropy, Tensor grad, StringHandle instruction_set) {
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
                 Tensor log_sum, Tensor entropy, Tensor token_ids, Tensor log_probs, StringHandle instruction_set) {
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

RowView view_like(const Tensor& tensor, const RowView& like, int64_t skipped = 0) {
  const RowView view = row_view(tensor, skipped);
  STD_TORCH_CHECK(view.rows() == like.rows() && view.vocab == like.vocab, "rows of a pair must have the same shape");
  return view;
}

void truncated_log_softmax(Tensor logits, double temperature, std::optional<Tensor> temperatures, Tensor threshold,
                           Tensor size, Tensor max, Tensor log_sum, Tensor entropy, Tensor token_ids, Tensor log_probs,
                           Tensor result, StringHandle instruction_set) {
  const RowView view = row_view(logits);
  sdkernels::truncated_log_softmax(
      kernels_for(instruction_set), view, row_arguments(view, std::nullopt, std::nullopt, temperature, temperatures),
      supports_of(view.rows(), threshold, size, max, log_sum, entropy, token_ids, log_probs), view_like(result, view),
      parallel_for);
}

void truncated_gradient(Tensor logits, std::optional<Tensor> upstream, std::optional<Tensor> label_ids,
                        std::optional<Tensor> on_label, std::optional<Tensor> on_entropy, double temperature,
                        std::optional<Tensor> temperatures, Tensor threshold, Tensor size, Tensor max, Tensor log_sum,
                        Tensor entropy, Tensor token_ids, Tensor log_probs, Tensor grad, StringHandle instruction_set) {
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
                     StringHandle instruction_set) {
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
                   Tensor on_cross, Tensor grad, StringHandle instruction_set) {
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

sdkernels::DivergenceOptions divergence_options(StringHandle divergence, double beta, double token_clip) {
  const std::string name = text_of(divergence);
  const bool forward = name == "forward_kl", reverse = name == "reverse_kl";
  STD_TORCH_CHECK(forward || reverse || name == "jsd", "no divergence ", name);
  return {forward ? sdkernels::kForwardKL : reverse ? sdkernels::kReverseKL : sdkernels::kJSD, beta, token_clip};
}

void row_divergence(Tensor student, Tensor teacher, std::optional<Tensor> mask, double temperature,
                    std::optional<Tensor> temperatures, StringHandle divergence, double beta, double token_clip,
                    std::optional<Tensor> known_log_sum, std::optional<Tensor> known_teacher_log_sum,
                    std::optional<Tensor> known_max, std::optional<Tensor> known_teacher_max, Tensor value,
                    Tensor slope, Tensor log_sum, Tensor teacher_log_sum, Tensor max, Tensor teacher_max,
                    StringHandle instruction_set) {
  const RowView view = row_view(student);
  const int64_t rows = view.rows();
  sdkernels::row_divergence(kernels_for(instruction_set), view, view_like(teacher, view),
                            row_arguments(view, std::nullopt, mask, temperature, temperatures),
                            divergence_options(divergence, beta, token_clip),
                            {doubles(known_log_sum, rows), doubles(known_teacher_log_sum, rows),
                             floats(known_max, rows), floats(known_teacher_max, rows)},
                            {doubles(value, rows), doubles(slope, rows), doubles(log_sum, rows),
                             doubles(teacher_log_sum, rows), floats(max, rows), floats(teacher_max, rows)},
                            parallel_for);
}

void divergence_gradient(Tensor student, Tensor teacher, double temperature, std::optional<Tensor> temperatures,
                         StringHandle divergence, double beta, double token_clip, Tensor slope, Tensor log_sum,
                         Tensor teacher_log_sum, Tensor max, Tensor teacher_max, Tensor upstream, Tensor grad,
                         StringHandle instruction_set) {
  const RowView view = row_view(student);
  const int64_t rows = view.rows();
  sdkernels::divergence_gradient(kernels_for(instruction_set), view, view_like(teacher, view),
                                 row_arguments(view, std::nullopt, std::nullopt, temperature, temperatures),
                                 divergence_options(divergence, beta, token_clip),
                                 {nullptr, doubles(slope, rows), doubles(log_sum, rows), doubles(teacher_log_sum, rows),
                                  floats(max, rows), floats(teacher_max, rows)},
                                 doubles(upstream, rows), view_like(grad, view), parallel_for);
}

void reduced_rows(Tensor student, Tensor teacher, Tensor token_ids, bool by_teacher, bool tail,
                  std::optional<Tensor> mask, double temperature, std::optional<Tensor> temperatures,
                  Tensor student_row, Tensor teacher_row, Tensor tail_max, Tensor tail_log_sum, Tensor teacher_tail_max,
                  Tensor teacher_tail_log_sum, StringHandle instruction_set) {
  const sdkernels::Kernels& kernels = kernels_for(instruction_set);
  const RowView view = row_view(student);
  const int64_t rows = view.rows(), capacity = capacity_of(token_ids, rows), entries = rows * (capacity + 1);
  const RowArguments arguments = row_arguments(view, std::nullopt, mask, temperature, temperatures);
  const int32_t* ids = vector_of<int32_t>(token_ids, ScalarType::Int, rows * capacity);
  // Ids of -1 in all places say that the row that chose them is bad.
  const auto tail_of = [&](bool chose) {
    return tail ? sdkernels::Tail::kSummed : chose ? sdkernels::Tail::kIgnored : sdkernels::Tail::kChecked;
  };
  sdkernels::reduced_rows(kernels, view, arguments, ids, capacity, tail_of(!by_teacher),
                          {floats(student_row, entries), floats(tail_max, rows), doubles(tail_log_sum, rows)},
                          parallel_for);
  sdkernels::reduced_rows(
      kernels, view_like(teacher, view), arguments, ids, capacity, tail_of(by_teacher),
      {floats(teacher_row, entries), floats(teacher_tail_max, rows), doubles(teacher_tail_log_sum, rows)},
      parallel_for);
}

void reduced_gradient(Tensor student, Tensor token_ids, double temperature, std::optional<Tensor> temperatures,
                      Tensor tail_max, Tensor tail_log_sum, Tensor upstream, Tensor grad,
                      StringHandle instruction_set) {
  const RowView view = row_view(student);
  const int64_t rows = view.rows(), capacity = capacity_of(token_ids, rows);
  sdkernels::reduced_gradient(kernels_for(instruction_set), view,
                              row_arguments(view, std::nullopt, std::nullopt, temperature, temperatures),
                              vector_of<int32_t>(token_ids, ScalarType::Int, rows * capacity), capacity,
                              {nullptr, floats(tail_max, rows), doubles(tail_log_sum, rows)},
                              floats(upstream, rows * (capacity + 1)), view_like(grad, view), parallel_for);
}

void row_information(Tensor student, Tensor teachers, std::optional<Tensor> mask, double temperature,
                     std::optional<Tensor> temperatures, std::optional<Tensor> log_sums, std::optional<Tensor> maxima,
                     Tensor total, Tensor marginal, Tensor information, StringHandle instruction_set) {
  const RowView view = row_view(student);
  const int64_t rows = view.rows(), known = rows * (teachers.size(0) + 1);
  std::vector<RowView> samples(teachers.size(0), view_like(teachers, view, 1));
  for (int64_t r = 0; r < teachers.size(0); ++r) samples[r].data += r * teachers.stride(0) * samples[r].element_size();
  sdkernels::row_information(kernels_for(instruction_set), view, samples,
                             row_arguments(view, std::nullopt, mask, temperature, temperatures),
                             {doubles(log_sums, known), floats(maxima, known)},
                             {doubles(total, rows), doubles(marginal, rows), doubles(information, rows)}, parallel_for);
}

void row_masses(Tensor logits, std::optional<Tensor> mask, double temperature, std::optional<Tensor> temperatures,
                Tensor max, Tensor pivots, Tensor counts, Tensor masses, Tensor moments, StringHandle instruction_set) {
  const RowView view = row_view(logits);
  const int64_t rows = view.rows(), number = capacity_of(pivots, rows), places = rows * number;
  sdkernels::row_masses(
      kernels_for(instruction_set), view, row_arguments(view, std::nullopt, mask, temperature, temperatures),
      floats(max, rows), floats(pivots, places), number,
      {vector_of<int64_t>(counts, ScalarType::Long, places), doubles(masses, places), doubles(moments, places)},
      parallel_for);
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
  m.def(
      "row_divergence(Tensor student, Tensor teacher, Tensor? mask, float temperature, Tensor? temperatures, "
      "str divergence, float beta, float token_clip, Tensor? known_log_sum, Tensor? known_teacher_log_sum, "
      "Tensor? known_max, Tensor? known_teacher_max, Tensor(a!) value, Tensor(b!) slope, Tensor(c!) log_sum, "
      "Tensor(d!) teacher_log_sum, Tensor(e!) max, Tensor(f!) teacher_max, str instruction_set='') -> ()");
  m.def(
      "divergence_gradient(Tensor student, Tensor teacher, float temperature, Tensor? temperatures, str divergence, "
      "float beta, float token_clip, Tensor slope, Tensor log_sum, Tensor teacher_log_sum, Tensor max, "
      "Tensor teacher_max, Tensor upstream, Tensor(a!) grad, str instruction_set='') -> ()");
  m.def(
      "reduced_rows(Tensor student, Tensor teacher, Tensor token_ids, bool by_teacher, bool tail, Tensor? mask, "
      "float temperature, Tensor? temperatures, Tensor(a!) student_row, Tensor(b!) teacher_row, Tensor(c!) tail_max, "
      "Tensor(d!) tail_log_sum, Tensor(e!) teacher_tail_max, Tensor(f!) teacher_tail_log_sum, "
      "str instruction_set='') -> ()");
  m.def(
      "reduced_gradient(Tensor student, Tensor token_ids, float temperature, Tensor? temperatures, Tensor tail_max, "
      "Tensor tail_log_sum, Tensor upstream, Tensor(a!) grad, str instruction_set='') -> ()");
  m.def(
      "row_information(Tensor student, Tensor teachers, Tensor? mask, float temperature, Tensor? temperatures, "
      "Tensor? log_sums, Tensor? maxima, Tensor(a!) total, Tensor(b!) marginal, Tensor(c!) information, "
      "str instruction_set='') -> ()");
  m.def(
      "row_masses(Tensor logits, Tensor? mask, float temperature, Tensor? temperatures, Tensor max, Tensor pivots, "
      "Tensor(a!) counts, Tensor(b!) masses, Tensor(c!) moments, str instruction_set='') -> ()");
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
  m.impl("row_divergence", TORCH_BOX(&row_divergence));
  m.impl("divergence_gradient", TORCH_BOX(&divergence_gradient));
  m.impl("reduced_rows", TORCH_BOX(&reduced_rows));
  m.impl("reduced_gradient", TORCH_BOX(&reduced_gradient));
  m.impl("row_information", TORCH_BOX(&row_information));
  m.impl("row_masses", TORCH_BOX(&row_masses));
}
