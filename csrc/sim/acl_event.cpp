// SPDX-License-Identifier: Apache-2.0
#include <acl/acl.h>

#include <atomic>

#include "captures.h"
#include "context.h"
#include "error.h"
#include "faults.h"

using sim::Event;

namespace {

aclError create_event(const char* call, aclrtEvent* handle, uint32_t flags) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null event", call);
  SIM_REQUIRE(sim::current_context() != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  auto event = std::make_shared<Event>();
  event->flags = flags;
  *handle = sim::events().add(event);
  return ACL_SUCCESS;
}

aclError find_event(const char* call, aclrtEvent handle, std::shared_ptr<Event>* event) {
  *event = sim::events().find(handle);
  SIM_REQUIRE(*event != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not an event, or was destroyed", call, handle);
  return ACL_SUCCESS;
}

aclError synchronize(const char* call, aclrtEvent handle, int32_t timeout_ms) {
  std::shared_ptr<Event> event;
  if (aclError error = find_event(call, handle, &event)) return error;
  if (aclError error = sim::refuse_captured(call, *event)) return error;
  auto marker = event->recorded();
  if (marker == nullptr) return ACL_SUCCESS;
  SIM_REQUIRE(sim::device::synchronize(*marker, timeout_ms), ACL_ERROR_RT_EVENT_SYNC_TIMEOUT,
              "%s: the event is not reached after %d ms", call, timeout_ms);
  sim::Context* context = sim::current_context();
  return context == nullptr ? ACL_SUCCESS : context->failure(call);
}

aclError query(const char* call, aclrtEvent handle, bool* reached) {
  std::shared_ptr<Event> event;
  if (aclError error = find_event(call, handle, &event)) return error;
  if (aclError error = sim::refuse_captured(call, *event)) return error;
  auto marker = event->recorded();
  *reached = marker == nullptr || sim::device::reached(*marker);
  return ACL_SUCCESS;
}

aclError timestamp(const char* call, aclrtEvent handle, uint64_t* nanoseconds) {
  std::shared_ptr<Event> event;
  if (aclError error = find_event(call, handle, &event)) return error;
  if (aclError error = sim::refuse_captured(call, *event)) return error;
  auto marker = event->recorded();
  SIM_REQUIRE((event->flags & ACL_EVENT_TIME_LINE) != 0 && marker != nullptr,
              ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
              "%s: the event was not created with ACL_EVENT_TIME_LINE, or is not recorded", call);
  SIM_REQUIRE(sim::device::reached(*marker), ACL_ERROR_RT_EVENT_NOT_COMPLETE,
              "%s: the event is not reached yet", call);
  *nanoseconds = sim::device::nanoseconds(*marker);
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

aclError aclrtCreateEvent(aclrtEvent* event) {
  SIM_CALL();
  return create_event("aclrtCreateEvent", event, ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE);
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flags) {
  SIM_CALL();
  return create_event("aclrtCreateEventWithFlag", event, flags);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flags) {
  SIM_CALL();
  return create_event("aclrtCreateEventExWithFlag", event, flags);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  SIM_CALL();
  SIM_REQUIRE(sim::events().remove(event) != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "aclrtDestroyEvent: %p is not an event, or was destroyed", event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  SIM_CALL();
  std::shared_ptr<Event> event;
  if (aclError error = find_event("aclrtRecordEvent", handle, &event)) return error;
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream("aclrtRecordEvent", stream_handle, &stream)) return error;
  std::lock_guard<std::mutex> lock(event->mutex);
  if (auto graph = stream->captured()) event->graph = graph;
  if (aclError error = sim::refuse_recording("aclrtRecordEvent", *stream)) return error;
  event->marker = sim::device::record(stream->queue);
  return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream_handle) {
  SIM_CALL();
  std::shared_ptr<Event> event;
  if (aclError error = find_event("aclrtResetEvent", handle, &event)) return error;
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream("aclrtResetEvent", stream_handle, &stream)) return error;
  return sim::refuse_recording("aclrtResetEvent", *stream);
}

aclError aclrtQueryEvent(aclrtEvent event, aclrtEventStatus* status) {
  SIM_CALL();
  SIM_REQUIRE(status != nullptr, ACL_ERROR_RT_PARAM_INVALID, "aclrtQueryEvent: null status");
  bool reached = false;
  if (aclError error = query("aclrtQueryEvent", event, &reached)) return error;
  *status = reached ? ACL_EVENT_STATUS_COMPLETE : ACL_EVENT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  SIM_CALL();
  SIM_REQUIRE(status != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null status", __func__);
  bool reached = false;
  if (aclError error = query("aclrtQueryEventStatus", event, &reached)) return error;
  *status = reached ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
  SIM_CALL();
  SIM_REQUIRE(status != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null status", __func__);
  bool reached = false;
  if (aclError error = query("aclrtQueryEventWaitStatus", event, &reached)) return error;
  *status = reached ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  SIM_CALL();
  return synchronize("aclrtSynchronizeEvent", event, -1);
}

aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout) {
  SIM_CALL();
  SIM_REQUIRE_TIMEOUT(timeout);
  return synchronize("aclrtSynchronizeEventWithTimeout", event, timeout);
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  SIM_CALL();
  SIM_REQUIRE(milliseconds != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null result", __func__);
  uint64_t from = 0;
  uint64_t to = 0;
  if (aclError error = timestamp("aclrtEventElapsedTime", start, &from)) return error;
  if (aclError error = timestamp("aclrtEventElapsedTime", end, &to)) return error;
  *milliseconds = static_cast<float>(static_cast<int64_t>(to - from)) * 1e-6f;
  return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
  SIM_CALL();
  SIM_REQUIRE(microseconds != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null result", __func__);
  uint64_t nanoseconds = 0;
  if (aclError error = timestamp("aclrtEventGetTimestamp", event, &nanoseconds)) return error;
  *microseconds = nanoseconds / 1000;
  return ACL_SUCCESS;
}

aclError aclrtGetEventId(aclrtEvent handle, uint32_t* id) {
  SIM_CALL();
  std::shared_ptr<Event> event;
  if (aclError error = find_event("aclrtGetEventId", handle, &event)) return error;
  *id = static_cast<uint32_t>(reinterpret_cast<uint64_t>(handle) >> 4);
  return ACL_SUCCESS;
}

}  // extern "C"
