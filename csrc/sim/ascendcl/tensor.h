// SPDX-License-Identifier: Apache-2.0
//
// What the framework says of a tensor that it hands to a compiled operator.
#pragma once

#include <acl/acl.h>

#include <string>
#include <vector>

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> sizes;
  std::string name;
  // How it lies in memory.
  aclFormat storage_format;
  std::vector<int64_t> storage_sizes;
};
