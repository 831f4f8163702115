// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <vector>

#include "third_party/hccl/inc/hccl/hccl_types.h"

namespace sim::hccl {

size_t size_of(HcclDataType type);  // bytes of an element, or 0 for an unknown type

// Whether HCCL supports this reduction for this type.
bool reduces(HcclDataType type, HcclReduceOp operation);

// Reduces element by element in the order of the inputs, so that every rank gets the same bits.
// 16-bit floats are summed in 32 bits and rounded once. The output may be one of the inputs.
void reduce(void* output, const std::vector<const void*>& inputs, size_t count, HcclDataType type,
            HcclReduceOp operation);

}  // namespace sim::hccl
