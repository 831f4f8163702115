// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <acl/acl_rt.h>
#include <acl/error_codes/rt_error_codes.h>

namespace sim {

// Stores the message for aclGetRecentErrMsg of this thread, and returns the code.
aclError fail(aclError code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// For what causes a fault on hardware: prints the reason and aborts.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

const char* take_recent_message();
aclError last_error(bool clear);

}  // namespace sim
