// SPDX-License-Identifier: Apache-2.0
//
// Where this process has its page-locked memory from, and what that costs, found out by trying.
#pragma once

#include <optional>
#include <string>

#include "copy_stream.h"
#include "host_memory.h"

namespace camem {

// A way to page-locked memory, and the reason why it is this one, in words.
struct HostChoice {
  HostSource source;
  std::string why;
};

// `wanted`, or without a wish: registered memory where that is page-locked and copies from and to
// it are asynchronous and exact, else aclrtMallocHost. A wish for registered memory is not met
// where it cannot be. Needs the device to be current; copies are tried on `stream`, which may be
// null.
HostChoice choose_host_source(std::optional<HostSource> wanted, int device, CopyStream* stream);

// Bytes per second that several threads together take from the host as page-locked memory, and that
// they copy into memory which is touched for the first time.
struct HostSpeeds {
  double locking;
  double copying;
};

}  // namespace camem
