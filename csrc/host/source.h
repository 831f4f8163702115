// SPDX-License-Identifier: Apache-2.0
//
// Where this process has its page-locked memory from, and what that costs, found out by trying.
#pragma once

#include <string>

#include "ascendcl/copy_stream.h"
#include "host/memory.h"

namespace camem {

// A way to page-locked memory, and the reason why it is this one, in words.
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

// Bytes per second that several threads together take from the host as page-locked memory, and that
// they copy into memory which is touched for the first time.
struct HostSpeeds {
  double locking;
  double copying;
};

}  // namespace camem
