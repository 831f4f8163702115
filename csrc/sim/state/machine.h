// SPDX-License-Identifier: Apache-2.0
//
// The part of a simulated device that all processes of the machine share: how much of its memory
// and how many of its streams are taken, and how busy its link is. Devices are physical devices
// here.
#pragma once

#include <cstddef>

#include "device.h"

namespace sim::machine {

// Atomic among processes: takes the bytes if they are free. A process that ends, however it ends,
// gives back what it holds.
bool take(int device, size_t bytes);
void give(int device, size_t bytes);

size_t taken(int device);  // by all processes
size_t taken_by_this_process(int device);

// Likewise of streams.
bool take_stream(int device);
void give_stream(int device);
size_t streams_left(int device);

// Holds the caller until the link (NPU_SIM_LINK_GBPS) would have moved these bytes.
void occupy_link(int device, device::Direction direction, size_t bytes);

}  // namespace sim::machine
