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

// Makes copies from and to [address, address + bytes) asynchronous; the range must be page-aligned.
// Locks no page. Returns 207000 if the installed AscendCL lacks the call (before CANN 8.5).
aclError host_register(void* address, std::size_t bytes);
aclError host_unregister(void* address);

// Streams that the current device has left for all processes; empty if AscendCL cannot tell.
std::optional<std::size_t> available_streams();

// Whether the stream captures a graph, in which case AscendCL refuses even to query it.
bool is_capturing(aclrtStream stream);

// Bytes of device memory that this process holds, by component of CANN (APP, HCCL, RUNTIME, ...).
// Empty if the installed AscendCL cannot tell.
std::optional<std::unordered_map<std::string, std::size_t>> component_bytes(int device);

// AscendCL's message about the last failure on this thread, or empty.
std::string recent_error_message();

}  // namespace camem
