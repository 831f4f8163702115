// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace sim::operators {

// out[m][n] = sum over k of inputs[m][k] * weights[n][k]
struct NarrowProduct {
  int64_t rows;         // m
  int64_t columns;      // n
  int64_t depth;        // k
  const float* inputs;  // rows of padded_depth values, zero beyond depth
  int64_t padded_depth;
  const uint16_t* weights;  // of 16 bits
  int64_t weight_stride;
  bool is_bfloat16;  // else fp16
  float* out;        // contiguous
};

int64_t padded_depth(int64_t depth);
void run(const NarrowProduct& product);

}  // namespace sim::operators
