// SPDX-License-Identifier: Apache-2.0
#include <acl/acl.h>
#include <pthread.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <mutex>
#include <regex>
#include <string>
#include <vector>

#include "error.h"
#include "faults.h"
#include "settings.h"
#include "state/captures.h"
#include "state/context.h"
#include "state/machine.h"

namespace sim {
namespace {

struct Devices {
  std::mutex mutex;
  Context* primary[kMaxDevices] = {};
  int initialised = 0;
  bool finalised = false;
  int32_t default_device = -1;  // from aclInit's configuration; if -1, threads must choose one
};

Devices& devices() {
  static Devices* once = new Devices;
  return *once;
}

thread_local Context* thread_context = nullptr;

bool is_device(int32_t index) {
  return index >= 0 && index < static_cast<int32_t>(settings().visible.size());
}

// Streams that contexts use themselves: a device has one from its first context until its last one
// ends, which is the default context's, and each other context has its own.
std::mutex streams_mutex;
int contexts_of[kMaxDevices] = {};

int own_streams(const Context& context) {
  const auto each = static_cast<int>(settings().chip.context_streams);
  return context.primary ? each - 1 : each;
}

void give_own_streams(const Context& context, int count) {
  for (int i = 0; i < count; ++i) machine::give_stream(context.physical);
}

bool take_own_streams(const char* call, const Context& context) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  const bool is_first = contexts_of[context.index] == 0;
  const int wanted = own_streams(context) + (is_first ? 1 : 0);
  for (int taken = 0; taken < wanted; ++taken) {
    if (take_stream(call, context) == ACL_SUCCESS) continue;
    give_own_streams(context, taken);
    return false;
  }
  ++contexts_of[context.index];
  return true;
}

void give_own_streams(const Context& context) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  const bool is_last = --contexts_of[context.index] == 0;
  give_own_streams(context, own_streams(context) + (is_last ? 1 : 0));
}

// Null if the device has no stream left, as the thread's recent message says.
Context* make_context(const char* call, int index, bool primary) {
  static int once = pthread_atfork(nullptr, nullptr, faults::refuse_after_fork);
  (void)once;
  // Never freed, because a thread may still refer to it.
  static auto* made = new std::vector<Context*>;
  auto* context = new Context;
  context->index = index;
  context->physical = settings().visible[index];
  context->primary = primary;
  if (!take_own_streams(call, *context)) {
    delete context;
    return nullptr;
  }
  context->default_stream = new_stream(context, 0, 0);
  context->handle = contexts().add(std::shared_ptr<Context>(context, [](Context*) {}));
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  made->push_back(context);
  return context;
}

// The lock must be held.
Context* enter_primary(const char* call, int32_t index) {
  Context*& primary = devices().primary[index];
  if (primary == nullptr) primary = make_context(call, index, true);
  if (primary != nullptr) ++primary->references;
  return primary;
}

// `"defaultDevice": {"default_device": "N"}` of an AscendCL configuration file, or -1.
int32_t configured_default_device(const char* path) {
  std::ifstream file(path);
  const std::string text(std::istreambuf_iterator<char>(file), {});
  std::smatch match;
  static const std::regex entry("\"default_device\"\\s*:\\s*\"?(\\d+)");
  return std::regex_search(text, match, entry) ? std::stoi(match[1]) : -1;
}

void drop_context(Context* context) {
  synchronize("context that ends", *context, -1);
  context->alive = false;
  contexts().remove(context->handle);
  for (auto& [handle, stream] : streams().all()) {
    bool removed = stream->context == context && streams().remove(handle) != nullptr;
    if (!removed) continue;
    device::destroy_stream(stream->queue);
    machine::give_stream(context->physical);
  }
  give_own_streams(*context);
  drop_graphs(*context);
}

aclError bad_device(const char* call, int32_t index) {
  return fail(ACL_ERROR_RT_INVALID_DEVICEID, "%s: there is no device %d, %zu are visible", call,
              index, settings().visible.size());
}

aclError reset(const char* call, int32_t index, bool force) {
  if (!is_device(index)) return bad_device(call, index);
  std::lock_guard<std::mutex> lock(devices().mutex);
  Context*& primary = devices().primary[index];
  SIM_REQUIRE(primary != nullptr, ACL_ERROR_RT_CONTEXT_RELEASE_ERROR, "%s: device %d is not set",
              call, index);
  if (--primary->references > 0 && !force) return ACL_SUCCESS;
  drop_context(primary);
  primary = nullptr;
  return ACL_SUCCESS;
}

}  // namespace

Context* current_context() {
  if (thread_context != nullptr && thread_context->alive) return thread_context;
  std::lock_guard<std::mutex> lock(devices().mutex);
  if (!is_device(devices().default_device)) return nullptr;
  return thread_context = enter_primary("default device", devices().default_device);
}

}  // namespace sim

extern "C" {

aclError aclInit(const char* configuration) {
  SIM_CALL();
  std::lock_guard<std::mutex> lock(sim::devices().mutex);
  SIM_REQUIRE(sim::devices().initialised == 0, ACL_ERROR_REPEAT_INITIALIZE,
              "aclInit: already initialised");
  sim::devices().initialised = 1;
  sim::devices().finalised = false;
  sim::devices().default_device =
      configuration == nullptr ? -1 : sim::configured_default_device(configuration);
  return ACL_SUCCESS;
}

aclError aclFinalize() {
  SIM_CALL();
  std::lock_guard<std::mutex> lock(sim::devices().mutex);
  SIM_REQUIRE(!sim::devices().finalised, ACL_ERROR_REPEAT_FINALIZE,
              "aclFinalize: already finalised");
  SIM_REQUIRE(sim::devices().initialised != 0, ACL_ERROR_UNINITIALIZE,
              "aclFinalize: not initialised");
  sim::devices().initialised = 0;
  sim::devices().finalised = true;
  return ACL_SUCCESS;
}

const char* aclGetRecentErrMsg() { return sim::take_recent_message(); }

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return sim::last_error(false); }
aclError aclrtGetLastError(aclrtLastErrLevel) { return sim::last_error(true); }

aclError aclrtGetDeviceCount(uint32_t* count) {
  SIM_CALL();
  SIM_REQUIRE(count != nullptr, ACL_ERROR_INVALID_PARAM, "aclrtGetDeviceCount: null count");
  const auto& visible = sim::settings().visible;
  SIM_REQUIRE(!visible.empty() || std::getenv("ASCEND_RT_VISIBLE_DEVICES") == nullptr,
              ACL_ERROR_RT_NO_DEVICE,
              "%s: ASCEND_RT_VISIBLE_DEVICES names no device, or not in ascending order", __func__);
  *count = static_cast<uint32_t>(visible.size());
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t index) {
  SIM_CALL();
  if (!sim::is_device(index)) return sim::bad_device("aclrtSetDevice", index);
  std::lock_guard<std::mutex> lock(sim::devices().mutex);
  sim::Context* context = sim::enter_primary("aclrtSetDevice", index);
  if (context == nullptr) return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
  sim::thread_context = context;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t index) {
  SIM_CALL();
  return sim::reset("aclrtResetDevice", index, false);
}

aclError aclrtResetDeviceForce(int32_t index) {
  SIM_CALL();
  return sim::reset("aclrtResetDeviceForce", index, true);
}

aclError aclrtGetDevice(int32_t* index) {
  SIM_CALL();
  SIM_REQUIRE(index != nullptr, ACL_ERROR_INVALID_PARAM, "aclrtGetDevice: null device");
  SIM_CONTEXT(context);
  *index = context->index;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeDevice() {
  SIM_CALL();
  SIM_CONTEXT(context);
  if (aclError error = sim::refuse_captured(__func__, *context)) return error;
  return sim::synchronize(__func__, *context, -1);
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  SIM_CALL();
  SIM_REQUIRE_TIMEOUT(timeout);
  SIM_CONTEXT(context);
  if (aclError error = sim::refuse_captured(__func__, *context)) return error;
  return sim::synchronize(__func__, *context, timeout);
}

aclError aclrtCreateContext(aclrtContext* handle, int32_t index) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "aclrtCreateContext: null context");
  if (!sim::is_device(index)) return sim::bad_device("aclrtCreateContext", index);
  sim::Context* context = sim::make_context("aclrtCreateContext", index, false);
  if (context == nullptr) return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
  sim::thread_context = context;
  *handle = context->handle;
  return ACL_SUCCESS;
}

aclError aclrtDestroyContext(aclrtContext handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "aclrtDestroyContext: null context");
  auto context = sim::contexts().find(handle);
  SIM_REQUIRE(context != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "aclrtDestroyContext: %p is not a context", handle);
  SIM_REQUIRE(!context->primary, ACL_ERROR_RT_CONTEXT_NULL,
              "aclrtDestroyContext: a device's default context is destroyed by aclrtResetDevice");
  sim::drop_context(context.get());
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "aclrtSetCurrentContext: null context");
  auto context = sim::contexts().find(handle);
  SIM_REQUIRE(context != nullptr, ACL_ERROR_RT_PARAM_INVALID,
              "aclrtSetCurrentContext: %p is not a context", handle);
  sim::thread_context = context.get();
  return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext* handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null context", __func__);
  sim::Context* context = sim::thread_context;  // not that of a default device
  SIM_REQUIRE(context != nullptr && context->alive, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", __func__);
  *handle = context->handle;
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t index, uint32_t* flags, int32_t* active) {
  SIM_CALL();
  if (!sim::is_device(index)) return sim::bad_device("aclrtGetPrimaryCtxState", index);
  std::lock_guard<std::mutex> lock(sim::devices().mutex);
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = sim::devices().primary[index] != nullptr ? 1 : 0;
  return ACL_SUCCESS;
}

aclError aclrtCtxGetCurrentDefaultStream(aclrtStream* stream) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  *stream = nullptr;
  return ACL_SUCCESS;
}

}  // extern "C"
