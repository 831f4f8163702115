// SPDX-License-Identifier: Apache-2.0
//
// Which host memory stays where it is while the device works on it. Registering is not enough: the
// driver reaches registered memory by the addresses of its pages, and the kernel may move those.
#pragma once

#include <cstddef>

#include "settings.h"

namespace sim {

// The first versions of the host that can do it.
constexpr Version kKernelThatKeepsMlocked = {5, 11};  // older ones move registered pages anyway
constexpr Version kPinningKernel = {5, 19};           // lets the driver pin memory on request
constexpr Version kPinningDriver = {26, 0};           // none is public that does: see README.md

// How much of the range, from its start on, is page-locked.
size_t locked_bytes(const void* begin, size_t bytes);

}  // namespace sim
