// SPDX-License-Identifier: Apache-2.0
#include "ascendcl/contexts.h"

#include <map>
#include <mutex>
#include <string>

#include "ascendcl/check.h"
#include "ascendcl/newer.h"

namespace camem {

namespace {

// torch relies on the context that it chose, so a failing call is retried once.
void put_back(aclrtContext context) noexcept {
  if (aclrtSetCurrentContext(context) == ACL_SUCCESS) return;
  CAMEM_CHECK_NOEXCEPT(aclrtSetCurrentContext(context), 0);
}

}  // namespace

aclrtContext current_context() {
  aclrtContext context = nullptr;
  const aclError code = aclrtGetCurrentContext(&context);
  if (code == kContextNull) return nullptr;
  check(code, "aclrtGetCurrentContext", 0, __FILE__, __LINE__);
  return context;
}

ContextGuard::ContextGuard(aclrtContext context) {
  const aclrtContext previous = current_context();
  if (previous == context) return;
  CAMEM_CHECK(aclrtSetCurrentContext(context), 0);
  previous_ = previous;
}

ContextGuard::ContextGuard(const OwnContext& own) {
  aclrtContext previous = current_context();
  if (previous == own.get()) return;
  if (previous == nullptr) previous = default_context(own.device());
  CAMEM_CHECK(aclrtSetCurrentContext(own.get()), 0);
  previous_ = previous;
}

ContextGuard::~ContextGuard() {
  if (previous_ != nullptr) put_back(previous_);
}

aclrtContext default_context(int device) {
  static std::mutex mutex;
  static std::map<int, aclrtContext> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const aclrtContext previous = current_context();
  CAMEM_CHECK(aclrtSetDevice(device), 0);
  aclrtContext context = nullptr;
  const aclError code = aclrtGetCurrentContext(&context);
  if (previous != nullptr && previous != context) put_back(previous);
  check(code, "aclrtGetCurrentContext", 0, __FILE__, __LINE__);
  known.emplace(device, context);
  return context;
}

void wait_for(const std::set<aclrtContext>& contexts, std::chrono::milliseconds limit) {
  const auto timeout_ms = static_cast<std::int32_t>(limit.count());
  constexpr const char* kCall = "aclrtSynchronizeDeviceWithTimeout";
  for (const aclrtContext context : contexts) {
    const ContextGuard guard(context);
    const aclError code = aclrtSynchronizeDeviceWithTimeout(timeout_ms);
    if (code == kStreamSyncTimeout) {
      throw AclError(kCall, code, 0,
                     "earlier work on the device has not ended after " +
                         std::to_string(timeout_ms) + " ms (device_timeout_s)");
    }
    if (code == kStreamCaptured) {
      throw AclError(kCall, code, 0, "a stream captures a graph: retry when the capture has ended");
    }
    check(code, kCall, 0, __FILE__, __LINE__);
  }
}

DeviceGuard::DeviceGuard(int device) {
  int32_t current = -1;
  if (aclrtGetDevice(&current) == ACL_SUCCESS && current == device) return;
  guard_.emplace(default_context(device));
}

OwnContext::OwnContext(int device) : device_(device) {
  const ContextGuard guard(default_context(device));
  CAMEM_CHECK(aclrtCreateContext(&context_, device), 0);
  put_back(default_context(device));  // the new one has become current
}

OwnContext::~OwnContext() { CAMEM_CHECK_NOEXCEPT(aclrtDestroyContext(context_), 0); }

}  // namespace camem
