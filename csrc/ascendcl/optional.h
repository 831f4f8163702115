// SPDX-License-Identifier: Apache-2.0
//
// AscendCL functions that some CANN releases or chips lack, looked up at run time.
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <optional>
#include <string>
#include <unordered_map>

namespace camem {

// Lets copies from and to [address, address + bytes), which must be page-aligned, be asynchronous.
// Locks no page. Returns 207000 where the installed AscendCL lacks the call (before CANN 8.5).
aclError host_register(void* address, std::size_t bytes);
aclError host_unregister(void* address);

// Streams that the current device can still give to any process; nothing where AscendCL cannot
// tell.
std::optional<std::size_t> available_streams();

// Whether the stream captures a graph, so that even to query it is refused.
bool is_capturing(aclrtStream stream);

// Bytes of device memory that this process holds, by component of CANN: APP, HCCL, RUNTIME and so
// on. Nothing where the installed AscendCL cannot tell.
std::optional<std::unordered_map<std::string, std::size_t>> component_bytes(int device);

// AscendCL's own words about the last failure on this thread; empty if it has none.
std::string recent_error_message();

}  // namespace camem
