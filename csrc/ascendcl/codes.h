// SPDX-License-Identifier: Apache-2.0
//
// AscendCL's return codes by name. Headers of older CANNs lack some of them, and an older library
// may run under a newer driver: so they are written out here.
#pragma once

#include <acl/acl.h>

#include <vector>

namespace camem {

struct AclCode {
  aclError code;
  const char* name;
};

// Every code of acl/error_codes/rt_error_codes.h and acl/acl_base_rt.h but success, in ascending
// order.
const std::vector<AclCode>& acl_codes();

// The name of a return code, or "unknown".
const char* code_name(aclError code);

bool is_out_of_memory(aclError code);

}  // namespace camem
