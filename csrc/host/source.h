// SPDX-License-Identifier: Apache-2.0
//
// Determines by trial where this process gets page-locked memory, and how fast that is.
#pragma once

#include <cstddef>
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

// Tries copies between registered memory and that of the device, whose content is lost. Empty: they
// are exact, and return before they are done; else why registered memory is not to be used. Throws
// AclError; something is in flight then only if the stream is stuck.
std::string why_registered_copies_are_not_used(std::byte* registered, std::byte* device,
                                               std::size_t bytes, CopyStream& stream);

// Bytes per second, of several threads together: allocating page-locked memory, and copying into
// memory that is touched for the first time.
struct HostSpeeds {
  double locking;
  double copying;
};

}  // namespace camem
