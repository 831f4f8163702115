// SPDX-License-Identifier: Apache-2.0
//
// Products of few rows with a 16-bit weight matrix, as in decoding. The weights are read once and
// widened in registers, so the product is as fast as memory. Sums do not depend on the number of
// rows.
#include "operators/narrow.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

// Clones for different vector units; the library itself runs on any processor.
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))

namespace sim::operators {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 4;  // rows that share one pass over the weights

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <bool kBrain>
inline __attribute__((always_inline)) Floats widen(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  Words bits = __builtin_convertvector(halves, Words);
  if (kBrain) return reinterpret_cast<Floats>(bits << 16);
  // The fp16 exponent is 112 less. An exponent of all ones (infinity, NaN) must stay all ones.
  Words magnitude = (bits & 0x7fffu) << 13;
  Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  Words special = reinterpret_cast<Words>((bits & 0x7c00u) == 0x7c00u);
  Words result = reinterpret_cast<Words>(scaled) | (special & 0x7f800000u);
  return reinterpret_cast<Floats>(result | (bits & 0x8000u) << 16);
}

inline __attribute__((always_inline)) float sum(const Floats& lanes) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

template <bool kBrain, int64_t kRows>
inline __attribute__((always_inline)) void dot_rows(const uint16_t* weights, const float* rows,
                                                    int64_t padded, int64_t depth, float* out,
                                                    int64_t out_stride) {
  Floats sums[kRows] = {};
  int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Floats weight = widen<kBrain>(weights + k);
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      Floats value;
      std::memcpy(&value, rows + row * padded + k, sizeof(value));
      sums[row] += value * weight;
    }
  }
  if (whole < depth) {
    uint16_t tail[kLanes] = {};
    std::memcpy(tail, weights + whole, (depth - whole) * sizeof(uint16_t));
    Floats weight = widen<kBrain>(tail);
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      Floats value;
      std::memcpy(&value, rows + row * padded + whole, sizeof(value));
      sums[row] += value * weight;
    }
  }
  for (int64_t row = 0; row < kRows; ++row) out[row * out_stride] = sum(sums[row]);
}

template <bool kBrain>
inline __attribute__((always_inline)) void columns(const NarrowProduct& p, int64_t begin,
                                                   int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const uint16_t* weights = p.weights + n * p.weight_stride;
    for (int64_t m = 0; m < p.rows; m += kTile) {
      const float* rows = p.inputs + m * p.padded_depth;
      float* out = p.out + m * p.columns + n;
      switch (std::min(p.rows - m, kTile)) {
        case 4:
          dot_rows<kBrain, 4>(weights, rows, p.padded_depth, p.depth, out, p.columns);
          break;
        case 3:
          dot_rows<kBrain, 3>(weights, rows, p.padded_depth, p.depth, out, p.columns);
          break;
        case 2:
          dot_rows<kBrain, 2>(weights, rows, p.padded_depth, p.depth, out, p.columns);
          break;
        default:
          dot_rows<kBrain, 1>(weights, rows, p.padded_depth, p.depth, out, p.columns);
      }
    }
  }
}

VECTORIZED void columns_bfloat16(const NarrowProduct& p, int64_t begin, int64_t end) {
  columns<true>(p, begin, end);
}

VECTORIZED void columns_float16(const NarrowProduct& p, int64_t begin, int64_t end) {
  columns<false>(p, begin, end);
}

}  // namespace

int64_t padded_depth(int64_t depth) { return (depth + kLanes - 1) / kLanes * kLanes; }

void run(const NarrowProduct& product) {
  constexpr int64_t kWorkPerThread = 1 << 17;  // multiplications below which threads do not pay
  int64_t grain = std::max<int64_t>(1, kWorkPerThread / (product.depth * product.rows + 1));
  at::parallel_for(0, product.columns, grain, [&](int64_t begin, int64_t end) {
    (product.is_bfloat16 ? columns_bfloat16 : columns_float16)(product, begin, end);
  });
}

}  // namespace sim::operators
