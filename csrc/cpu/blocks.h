// Blocks of a row as floats in L1, for the row algorithms that know no other dtype.
#pragma once

#include <algorithm>

#include "launch.h"

namespace sdkernels {

constexpr int64_t kPadding = 64;  // a multiple of every instruction set's step

inline int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// `count` <= kBlock elements of a row from column `begin`, padded with `padding`; in `buffer`, or where they lie.
inline const float* read_block(const Kernels& kernels, const RowView& view, int64_t row, int64_t begin, int64_t count,
                               float padding, float* buffer) {
  const char* source = view.at(row, begin);
  const int64_t full = count - count % kPadding;
  if (view.dtype == kFloat32 && full == count) return reinterpret_cast<const float*>(source);
  kernels.rows[view.dtype].widen(source, buffer, full);
  for (int64_t i = full; i < count; ++i) buffer[i] = element(view, row, begin + i);
  std::fill(buffer + count, buffer + padded(count), padding);
  return buffer;
}

// Where to put a block that `write_block` then brings to its row.
inline float* block_target(const RowView& view, int64_t row, int64_t begin, int64_t count, float* buffer) {
  const bool direct = view.dtype == kFloat32 && count % kPadding == 0;
  return direct ? reinterpret_cast<float*>(view.at(row, begin)) : buffer;
}

inline void write_block(const Kernels& kernels, const RowView& view, int64_t row, int64_t begin, int64_t count,
                        const float* block) {
  if (reinterpret_cast<const char*>(block) == view.at(row, begin)) return;
  const int64_t full = count - count % kPadding;
  kernels.rows[view.dtype].narrow(block, view.at(row, begin), full);
  for (int64_t i = full; i < count; ++i) set_element(view, row, begin + i, block[i]);
}

}  // namespace sdkernels
