// SPDX-License-Identifier: Apache-2.0
//
// What the exported calls of the simulated HCCL share.
#pragma once

#include <string>

#include "handles.h"
#include "hccl/communicator.h"

namespace sim::hccl {

Handles<Communicator>& communicators();

// Keeps "call: reason" as the recent message and returns the code.
HcclResult refuse(HcclResult code, const char* call, const std::string& reason);

}  // namespace sim::hccl

#define HCCL_CALL() \
  if (int refused = npuSimEnterCall(__func__)) return static_cast<HcclResult>(refused)

// HCCL answers a call of no elements at once, and the other ranks do not hear of it.
#define HCCL_SKIP_EMPTY(count) \
  if ((count) == 0) return HCCL_SUCCESS

// Counts the call and finds the communicator that it names.
#define HCCL_FIND(group, comm)                                                             \
  HCCL_CALL();                                                                             \
  auto group = ::sim::hccl::communicators().find(comm);                                    \
  if (group == nullptr) {                                                                  \
    return ::sim::hccl::refuse(HCCL_E_PARA, __func__, "not a communicator, or destroyed"); \
  }
