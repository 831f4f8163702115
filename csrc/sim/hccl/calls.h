// SPDX-License-Identifier: Apache-2.0
//
// Shared by the exported calls of the simulated HCCL.
#pragma once

#include <string>

#include "handles.h"
#include "hccl/communicator.h"

namespace sim::hccl {

Handles<Communicator>& communicators();

// Stores "call: reason" as the recent message and returns the code.
HcclResult refuse(HcclResult code, const char* call, const std::string& reason);

}  // namespace sim::hccl

#define HCCL_CALL() \
  if (int refused = npuSimEnterCall(__func__)) return static_cast<HcclResult>(refused)

// HCCL returns at once from a call with no elements; the other ranks do not notice it.
#define HCCL_SKIP_EMPTY(count) \
  if ((count) == 0) return HCCL_SUCCESS

// Counts the call and finds its communicator.
#define HCCL_FIND(group, comm)                                                             \
  HCCL_CALL();                                                                             \
  auto group = ::sim::hccl::communicators().find(comm);                                    \
  if (group == nullptr) {                                                                  \
    return ::sim::hccl::refuse(HCCL_E_PARA, __func__, "not a communicator, or destroyed"); \
  }
