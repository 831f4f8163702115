// SPDX-License-Identifier: Apache-2.0
//
// In which AscendCL context a thread works. torch works in the default context of each device, our
// copies in one of their own, and a user may have others: whoever changes a thread's context puts
// it back.
#pragma once

#include <acl/acl.h>

#include <chrono>
#include <optional>
#include <set>

namespace camem {

class OwnContext;

// Makes a context current on this thread, and at the end the one that was.
class ContextGuard {
 public:
  explicit ContextGuard(aclrtContext context);  // throws AclError
  // A thread that has no context is left with the default one of the device.
  explicit ContextGuard(const OwnContext& own);  // throws AclError
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  aclrtContext previous_ = nullptr;  // to be put back; null: none
};

// The context of this thread; null where it has none. Throws AclError.
aclrtContext current_context();

// The context that all threads share that chose the device by aclrtSetDevice. Asking for it the
// first time counts as one such call, which is never taken back. Throws AclError.
aclrtContext default_context(int device);

// Waits for all that was launched in these contexts, for each no longer than this. Throws AclError.
void wait_for(const std::set<aclrtContext>& contexts, std::chrono::milliseconds limit);

// Makes `device` current on this thread, in whichever context: calls about memory need no more.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);  // throws AclError

 private:
  std::optional<ContextGuard> guard_;
};

// A context apart from torch's. Waiting for a device waits for one context and takes the failures
// of its work away, and it is refused while a stream of the context captures a graph: copies in
// the context of someone else would be told of their own failures by chance.
class OwnContext {
 public:
  explicit OwnContext(int device);  // throws AclError, also where the device has no stream left
  ~OwnContext();                    // streams in it must be gone
  OwnContext(const OwnContext&) = delete;
  OwnContext& operator=(const OwnContext&) = delete;

  aclrtContext get() const { return context_; }
  int device() const { return device_; }

 private:
  int device_;
  aclrtContext context_ = nullptr;
};

}  // namespace camem
