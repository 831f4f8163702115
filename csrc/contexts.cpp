// SPDX-License-Identifier: Apache-2.0
#include "contexts.h"

#include <map>
#include <mutex>

#include "acl_check.h"
#include "acl_newer.h"

namespace camem {

namespace {

// torch relies on the context that it chose: a single failing call must not lose it.
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
