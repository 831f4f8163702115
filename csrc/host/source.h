// SPDX-License-Identifier: Apache-2.0
//
// Determines by trial where this process gets page-locked memory, and how fast that is.
#pragma once

#include <string>

#include "ascendcl/copy_stream.h"
#include "host/memory.h"

namespace camem {

// The source of page-locked memory, and why it was chosen.
struct HostChoice {
  HostSource source;
  std::string why;

  bool operator!=(const HostChoice& other) const {
    return source != other.source || why != other.why;
  }
};

// Registered memory, if copies from and to it are asynchronous and exact on `stream`, else
// aclrtMallocHost. Needs the device to be current; `stream` may be null.
HostChoice try_registered_memory(int device, CopyStream* stream);

// Bytes per second, of several threads together: allocating page-locked memory, and copying into
// memory that is touched for the first time.
struct HostSpeeds {
  double locking;
  double copying;
};

}  // namespace camem
