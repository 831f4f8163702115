// SPDX-License-Identifier: Apache-2.0
//
// AscendCL's return codes by name. They are listed here because older headers lack some of them,
// and a newer driver may return codes that the installed CANN does not know.
#pragma once

#include <acl/acl.h>

#include <vector>

namespace camem {

struct AclCode {
  aclError code;
  const char* name;
};

// Every code of acl/error_codes/rt_error_codes.h and acl/acl_base_rt.h except success, in ascending
// order.
const std::vector<AclCode>& acl_codes();

// The name of a return code, or "unknown".
const char* code_name(aclError code);

bool is_out_of_memory(aclError code);

}  // namespace camem
