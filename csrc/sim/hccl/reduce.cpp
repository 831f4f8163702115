// SPDX-License-Identifier: Apache-2.0
#include "hccl/reduce.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sim::hccl {
namespace {

struct Bfloat16 {
  uint16_t bits;

  operator float() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }

  Bfloat16() = default;
  explicit Bfloat16(float value) {  // to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    uint32_t rounded = wide + 0x7fff + (wide >> 16 & 1);
    bits = static_cast<uint16_t>((std::isnan(value) ? wide | 0x400000 : rounded) >> 16);
  }
};

// Integers wrap as on hardware: they are added and multiplied as unsigned.
template <typename Sum>
Sum combine(Sum a, Sum b, HcclReduceOp operation) {
  if (operation == HCCL_REDUCE_MAX) return a != a ? a : b > a || b != b ? b : a;
  if (operation == HCCL_REDUCE_MIN) return a != a ? a : b < a || b != b ? b : a;
  if constexpr (std::is_integral_v<Sum>) {
    auto x = static_cast<uint64_t>(a);
    auto y = static_cast<uint64_t>(b);
    return static_cast<Sum>(operation == HCCL_REDUCE_SUM ? x + y : x * y);
  } else {
    return operation == HCCL_REDUCE_SUM ? a + b : a * b;
  }
}

template <typename Element, typename Sum = Element>
void reduce_as(void* output, const std::vector<const void*>& inputs, size_t count,
               HcclReduceOp operation) {
  constexpr size_t kBlock = 1024;
  Sum sums[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    size_t block = std::min(kBlock, count - start);
    auto* first = static_cast<const Element*>(inputs.front()) + start;
    for (size_t i = 0; i < block; ++i) sums[i] = static_cast<Sum>(first[i]);
    for (size_t rank = 1; rank < inputs.size(); ++rank) {
      auto* input = static_cast<const Element*>(inputs[rank]) + start;
      for (size_t i = 0; i < block; ++i) {
        sums[i] = combine(sums[i], static_cast<Sum>(input[i]), operation);
      }
    }
    auto* result = static_cast<Element*>(output) + start;
    for (size_t i = 0; i < block; ++i) result[i] = static_cast<Element>(sums[i]);
  }
}

}  // namespace

size_t size_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0:
      return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    default:
      return 0;
  }
}

bool reduces(HcclDataType type, HcclReduceOp operation) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_FP32:
      return operation <= HCCL_REDUCE_MIN;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_BFP16:
      return operation <= HCCL_REDUCE_MIN && operation != HCCL_REDUCE_PROD;
    default:
      return false;
  }
}

void reduce(void* output, const std::vector<const void*>& inputs, size_t count, HcclDataType type,
            HcclReduceOp operation) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
      return reduce_as<int8_t>(output, inputs, count, operation);
    case HCCL_DATA_TYPE_INT16:
      return reduce_as<int16_t>(output, inputs, count, operation);
    case HCCL_DATA_TYPE_INT32:
      return reduce_as<int32_t>(output, inputs, count, operation);
    case HCCL_DATA_TYPE_INT64:
      return reduce_as<int64_t>(output, inputs, count, operation);
    case HCCL_DATA_TYPE_FP16:
      return reduce_as<_Float16, float>(output, inputs, count, operation);
    case HCCL_DATA_TYPE_BFP16:
      return reduce_as<Bfloat16, float>(output, inputs, count, operation);
    default:
      return reduce_as<float>(output, inputs, count, operation);
  }
}

}  // namespace sim::hccl
