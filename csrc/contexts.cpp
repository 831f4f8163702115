// SPDX-License-Identifier: Apache-2.0
#include "contexts.h"

#include <map>
#include <mutex>

#include "acl_check.h"
#include "acl_newer.h"

namespace camem {

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

ContextGuard::~ContextGuard() {
  if (previous_ == nullptr || aclrtSetCurrentContext(previous_) == ACL_SUCCESS) return;
  CAMEM_CHECK_NOEXCEPT(aclrtSetCurrentContext(previous_), 0);  // once more: torch relies on it
}

aclrtContext default_context(int device) {
  static std::mutex mutex;
  static std::map<int, aclrtContext> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const aclrtContext previous = current_context();
  CAMEM_CHECK(aclrtSetDevice(device), 0);
  const aclrtContext context = current_context();
  if (previous != nullptr && previous != context) {
    CAMEM_CHECK(aclrtSetCurrentContext(previous), 0);
  }
  known.emplace(device, context);
  return context;
}

DeviceGuard::DeviceGuard(int device) {
  int32_t current = -1;
  if (aclrtGetDevice(&current) == ACL_SUCCESS && current == device) return;
  guard_.emplace(default_context(device));
}

OwnContext::OwnContext(int device) {
  ContextGuard guard(default_context(device));  // the new one becomes current
  CAMEM_CHECK(aclrtCreateContext(&context_, device), 0);
  const aclError code = aclrtSetCurrentContext(default_context(device));
  if (code == ACL_SUCCESS) return;
  CAMEM_CHECK_NOEXCEPT(aclrtDestroyContext(context_), 0);
  check(code, "aclrtSetCurrentContext", 0, __FILE__, __LINE__);
}

OwnContext::~OwnContext() { CAMEM_CHECK_NOEXCEPT(aclrtDestroyContext(context_), 0); }

}  // namespace camem
