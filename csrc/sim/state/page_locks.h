// SPDX-License-Identifier: Apache-2.0
//
// Which host memory stays in place while the device uses it. Registering is not enough: the driver
// accesses registered memory by the addresses of its pages, and the kernel may move them.
#pragma once

#include <cstddef>

#include "settings.h"

namespace sim {

// The first versions of the host with each feature.
constexpr Version kKernelThatKeepsMlocked = {5, 11};  // older ones may move mlocked pages too
constexpr Version kPinningKernel = {5, 19};           // lets the driver pin memory on request
constexpr Version kPinningDriver = {26, 0};           // assumed: no public one pins (README.md)

// The number of page-locked bytes from the start of the range.
size_t locked_bytes(const void* begin, size_t bytes);

}  // namespace sim
