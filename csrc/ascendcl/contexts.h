// SPDX-License-Identifier: Apache-2.0
//
// The AscendCL context of a thread. torch uses each device's default context, our copies use their
// own, and users may have others. Code that changes a thread's context restores it afterwards.
#pragma once

#include <acl/acl.h>

#include <chrono>
#include <optional>
#include <set>

namespace camem {

class OwnContext;

// Makes a context current on this thread, and restores the previous one at the end.
class ContextGuard {
 public:
  explicit ContextGuard(aclrtContext context);  // throws AclError
  // A thread without a context gets the device's default context at the end.
  explicit ContextGuard(const OwnContext& own);  // throws AclError
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  aclrtContext previous_ = nullptr;  // to be restored, if not null
};

// This thread's context, or null. Throws AclError.
aclrtContext current_context();

// The context shared by all threads that chose the device with aclrtSetDevice. The first call here
// counts as one aclrtSetDevice, which is never reset. Throws AclError.
aclrtContext default_context(int device);

// Waits for all work in these contexts, up to `limit` for each. Throws AclError.
void wait_for(const std::set<aclrtContext>& contexts, std::chrono::milliseconds limit);

// Makes `device` current on this thread, in any context: calls for memory need nothing else.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);  // throws AclError

 private:
  std::optional<ContextGuard> guard_;
};

// A context separate from torch's. Synchronising a device covers only one context, consumes the
// errors of its work, and is refused while one of its streams captures a graph. In a context shared
// with torch, our copies could miss their own errors.
class OwnContext {
 public:
  explicit OwnContext(int device);  // throws AclError, also where the device has no stream left
  ~OwnContext();                    // ends the streams in it
  OwnContext(const OwnContext&) = delete;
  OwnContext& operator=(const OwnContext&) = delete;

  aclrtContext get() const { return context_; }
  int device() const { return device_; }

 private:
  int device_;
  aclrtContext context_ = nullptr;
};

}  // namespace camem
