// SPDX-License-Identifier: Apache-2.0
//
// Shared by the two files of the CUDA device.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "device.h"
#include "error.h"

namespace sim::device::cuda {

// Makes the device's primary context, which torch uses too, current on this thread.
inline void use(int device) { cudaSetDevice(device); }

inline cudaMemcpyKind kind_of(Direction direction) {
  switch (direction) {
    case Direction::kHostToDevice:
      return cudaMemcpyHostToDevice;
    case Direction::kDeviceToHost:
      return cudaMemcpyDeviceToHost;
    default:
      return cudaMemcpyDeviceToDevice;
  }
}

// For calls whose failure leaves the device unusable: names the call and aborts.
inline void require(cudaError_t error, const char* call) {
  if (error != cudaSuccess) fault("%s: %s", call, cudaGetErrorString(error));
}

}  // namespace sim::device::cuda
