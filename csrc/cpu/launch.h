// Whole tensors of rows, still without a framework: views in, one result per row out.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

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
  const int64_t* token_ids;    // null: no labels
  const bool* mask;            // null: every row is kept
  double temperature;          // used where temperatures is null
  const double* temperatures;  // one for each `span` consecutive rows
  int64_t span;

  bool keeps(int64_t row) const { return (!token_ids || token_ids[row] != -100) && (!mask || mask[row]); }
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

struct Filters {  // 0, 1 and 0 keep everything
  int64_t top_k;
  double top_p, min_p;

  bool active() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

struct SupportResults {  // rows of `capacity` in the last two
  float* threshold;
  int64_t* size;
  float* max;
  double* log_sum;
  float* entropy;
  int32_t* token_ids;
  float* log_probs;

  void set_all(int64_t row, int64_t capacity, float value) const;  // of a row without a support
};

// Calls body(begin, end) on parts of [0, count), at least `grain` long each, in parallel.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kSplit = 32768;  // a row is cut here whatever the number of threads, so its sums never change

// log2(e) / T; finite and not 0, so that (z - m) scale is 0 for the maximum and -inf for -inf at any temperature.
float scale(double temperature);

// The log of a row's sum, to which its maximum alone adds 1: -inf where every logit is -inf, NaN where one is NaN or
// inf.
double log_of_sum(double sum);

// How many rows are worth a thread.
int64_t grain(const RowView& logits);

// The rows that count, set_zero(row) having been called on the others: masked rows cost nothing, so they must not
// unbalance the threads.
template <class Zero>
std::vector<int64_t> kept_rows(const RowView& logits, const RowArguments& arguments, const Zero& set_zero) {
  std::vector<int64_t> kept;
  for (int64_t row = 0; row < logits.rows(); ++row) {
    if (arguments.keeps(row))
      kept.push_back(row);
    else
      set_zero(row);
  }
  return kept;
}

// Calls body(row) on the rows that count, and set_zero(row) on the others.
template <class Body, class Zero>
void for_kept_rows(const RowView& logits, const RowArguments& arguments, const ParallelFor& parallel_for,
                   const Body& body, const Zero& set_zero) {
  const std::vector<int64_t> kept = kept_rows(logits, arguments, set_zero);
  parallel_for(kept.size(), grain(logits), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(kept[i]);
  });
}

// Of a whole row, in parts whose boundaries are always the same.
Statistics statistics_of(const Kernels& kernels, const RowView& logits, int64_t row, float scale);

float element(const RowView& view, int64_t row, int64_t column);
void set_element(const RowView& view, int64_t row, int64_t column, float value);

// A fresh tensor costs more in page faults than in arithmetic unless its pages are huge; in place, none is fresh.
void advise_huge_pages(const RowView& fresh, const RowView& source);

// S = {v : z_v >= threshold} of a row and its q; in rows whose size is at most `capacity` also as a list, -1 for none.
struct Supports {
  const float* threshold;
  const int64_t* size;
  const float* max;
  const double* log_sum;
  const float* entropy;
  const int32_t* token_ids;
  const float* log_probs;
  int64_t capacity;

  bool listed(int64_t row) const { return size[row] <= capacity; }
};

struct SupportUpstream {
  const RowView* log_q;  // null: zero, and so for each of these
  const int64_t* label_ids;
  const float *on_label, *on_entropy;
};

struct Pair {
  const RowView* base;       // null: lists only
  const float* threshold;    // null: S is all finite base logits
  const int64_t* size;       // null: every row is listed, or none if there are no lists
  const int32_t* token_ids;  // of lists with `capacity` places
  const float* log_probs;
  int64_t capacity;

  bool listed(int64_t row) const { return size ? size[row] <= capacity : !base; }
};

struct PairResults {  // the first four centred at support_max
  double *lse, *support_lse, *tempered_lse, *cross, *negentropy;
  int64_t* size;
  double *log_sum, *base_log_sum;
  float *max, *support_max, *base_max;
};

struct PairUpstream {
  const double *on_lse, *on_support_lse, *on_tempered_lse, *on_cross;
};

struct DivergenceOptions {
  Divergence divergence;
  double beta, token_clip;
};

struct DivergenceResults {
  double *divergence, *slope, *log_sum, *teacher_log_sum;
  float *max, *teacher_max;
};

struct DivergenceNormalisers {  // null: unknown
  const double *log_sum, *teacher_log_sum;
  const float *max, *teacher_max;
};

struct ReducedRow {  // `capacity` + 1 entries a row
  float* entries;
  float* tail_max;
  double* tail_log_sum;
};

enum class Tail { kSummed, kChecked, kIgnored };  // kChecked: only whether it holds NaN or +inf

struct InformationNormalisers {  // rows of all tokens, the student's first; null: unknown
  const double* log_sums;
  const float* maxima;
};

struct InformationResults {
  double *total, *marginal, *information;
};

struct MassResults {  // rows of as many as there are pivots
  int64_t* counts;
  double *masses, *moments;
};

// The names of the instruction sets that this processor can run, best first.
std::string instruction_sets();

// The kernels of one instruction set by its name; "" is the best. Null if this processor cannot run it.
const Kernels* find_kernels(const std::string& name);

void row_statistics(const Kernels&, const RowView& logits, const RowArguments&, const RowResults&, const ParallelFor&,
                    int threads);
void row_gradient(const Kernels&, const RowView& logits, const RowArguments&, const RowResults& saved,
                  const UpstreamGradients&, const RowView& grad, const ParallelFor&);
void row_support(const Kernels&, const RowView& logits, const RowArguments&, const Filters&, int64_t capacity,
                 bool partial, const SupportResults&, const ParallelFor&);
void truncated_log_softmax(const Kernels&, const RowView& logits, const RowArguments&, const Supports&,
                           const RowView& result, const ParallelFor&);
void truncated_gradient(const Kernels&, const RowView& logits, const RowArguments&, const Supports&,
                        const SupportUpstream&, const RowView& grad, const ParallelFor&);
void pair_statistics(const Kernels&, const RowView& student, const RowArguments&, const Pair&, const PairResults&,
                     const ParallelFor&);
void pair_gradient(const Kernels&, const RowView& student, const RowArguments&, const Pair&, const PairResults& saved,
                   const PairUpstream&, const RowView& grad, const ParallelFor&);
void row_divergence(const Kernels&, const RowView& student, const RowView& teacher, const RowArguments&,
                    const DivergenceOptions&, const DivergenceNormalisers&, const DivergenceResults&,
                    const ParallelFor&);
void divergence_gradient(const Kernels&, const RowView& student, const RowView& teacher, const RowArguments&,
                         const DivergenceOptions&, const DivergenceResults& saved, const double* upstream,
                         const RowView& grad, const ParallelFor&);
void reduced_rows(const Kernels&, const RowView& logits, const RowArguments&, const int32_t* token_ids,
                  int64_t capacity, Tail, const ReducedRow&, const ParallelFor&);
void reduced_gradient(const Kernels&, const RowView& student, const RowArguments&, const int32_t* token_ids,
                      int64_t capacity, const ReducedRow& saved, const float* upstream, const RowView& grad,
                      const ParallelFor&);
void row_information(const Kernels&, const RowView& student, const std::vector<RowView>& teachers, const RowArguments&,
                     const InformationNormalisers&, const InformationResults&, const ParallelFor&);
void row_masses(const Kernels&, const RowView& logits, const RowArguments&, const float* max, const float* pivots,
                int64_t number, const MassResults&, const ParallelFor&);

}  // namespace sdkernels
