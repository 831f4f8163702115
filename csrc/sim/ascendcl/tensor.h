// SPDX-License-Identifier: Apache-2.0
//
// The framework's description of a tensor for a compiled operator.
#pragma once

#include <acl/acl.h>

#include <string>
#include <vector>

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> sizes;
  std::string name;
  // The layout in memory.
  aclFormat storage_format;
  std::vector<int64_t> storage_sizes;
};
