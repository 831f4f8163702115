// SPDX-License-Identifier: Apache-2.0
//
// The state of a device that all processes of the machine share: its used memory and streams, and
// the load of its link. Devices are physical devices here.
#pragma once

#include <cstddef>

#include "device.h"

namespace sim::machine {

// Allocates the bytes if they are free, atomically among processes. However a process ends, what it
// holds is freed.
bool take(int device, size_t bytes);
void give(int device, size_t bytes);

size_t taken(int device);  // by all processes
size_t taken_by_this_process(int device);

// The same for streams.
bool take_stream(int device);
void give_stream(int device);
size_t streams_left(int device);

// Blocks the caller until the link (NPU_SIM_LINK_GBPS) would have moved these bytes.
void occupy_link(int device, device::Direction direction, size_t bytes);

}  // namespace sim::machine
