// SPDX-License-Identifier: Apache-2.0
#include <acl/acl.h>

#include <atomic>
#include <utility>

#include "error.h"
#include "faults.h"
#include "state/captures.h"
#include "state/context.h"

using sim::Event;
using sim::Stream;

namespace {

aclError create_event(const char* call, aclrtEvent* handle, uint32_t flags,
                      bool can_be_captured = false) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null event", call);
  SIM_REQUIRE(sim::current_context() != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  SIM_REQUIRE(
      (flags & ACL_EVENT_EXTERNAL) == 0 || (flags == ACL_EVENT_EXTERNAL && !can_be_captured),
      ACL_ERROR_RT_PARAM_INVALID,
      "%s: ACL_EVENT_EXTERNAL is for aclrtCreateEventWithFlag, and alone", call);
  *handle = sim::events().add(std::make_shared<Event>(flags, can_be_captured));
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
  SIM_REQUIRE(sim::wait(*marker, timeout_ms), ACL_ERROR_RT_EVENT_SYNC_TIMEOUT,
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

void mark(Event& event, const Stream& stream) {
  std::lock_guard<std::mutex> lock(event.mutex);
  event.marker = sim::device::record(stream.queue);
}

aclError require_capturable(const char* call, const Event& event) {
  SIM_REQUIRE(event.can_be_captured, ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: only events of aclrtCreateEventExWithFlag are captured", call);
  return ACL_SUCCESS;
}

// Operations on an external event are tasks like others, also in a graph.
aclError use_external(const char* call, Stream& stream, const std::shared_ptr<Event>& event,
                      void (*use)(Event& event, std::unique_lock<std::mutex>& lock)) {
  sim::Work work;
  work.run = [=] {
    std::unique_lock<std::mutex> lock(event->mutex);
    use(*event, lock);
    return ACL_SUCCESS;
  };
  return sim::give(call, stream, std::move(work));
}

aclError record_external(const char* call, Stream& stream, const std::shared_ptr<Event>& event) {
  auto set = [](Event& event, std::unique_lock<std::mutex>&) {
    event.is_set = true;
    event.changed.notify_all();
  };
  if (aclError error = use_external(call, stream, event, set)) return error;
  if (stream.captured() == nullptr) mark(*event, stream);
  return ACL_SUCCESS;
}

aclError wait_external(const char* call, Stream& stream, const std::shared_ptr<Event>& event) {
  return use_external(call, stream, event, [](Event& event, std::unique_lock<std::mutex>& lock) {
    event.changed.wait(lock, [&] { return event.is_set; });
  });
}

aclError reset_external(const char* call, Stream& stream, const std::shared_ptr<Event>& event) {
  return use_external(call, stream, event,
                      [](Event& event, std::unique_lock<std::mutex>&) { event.is_set = false; });
}

// The event itself is not changed, because the graph has its own copy.
aclError record_in_graph(const char* call, sim::Graph& graph, Stream& stream, Event& event) {
  if (aclError error = require_capturable(call, event)) return error;
  if (!event.is_known_to_streams()) return ACL_SUCCESS;
  std::shared_ptr<sim::CapturedRecord> record;
  if (aclError error = graph.keep_record(call, stream, &record)) return error;
  std::lock_guard<std::mutex> lock(event.mutex);
  event.in_graph = std::move(record);
  return ACL_SUCCESS;
}

aclError record(const char* call, Stream& stream, const std::shared_ptr<Event>& event) {
  if (aclError error = sim::refuse_updating(call, stream)) return error;
  if (event->is_external()) return record_external(call, stream, event);
  if (auto graph = stream.captured()) return record_in_graph(call, *graph, stream, *event);
  if (aclError error = sim::refuse_implicit(call, stream)) return error;
  mark(*event, stream);
  return ACL_SUCCESS;
}

// The stream joins the capture if it has not joined yet.
aclError wait_in_graph(const char* call, sim::Graph& graph, const std::shared_ptr<Stream>& stream,
                       sim::CapturedRecord& record) {
  SIM_REQUIRE(!stream->is_default(), ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
              "%s: the default stream cannot capture, and so not wait for a captured event", call);
  if (aclError error = sim::refuse_flags(call, *stream)) return error;
  auto own = stream->captured();
  if (own != nullptr && own.get() != &graph) {
    own->spoil();
    graph.spoil();
    return sim::fail(ACL_ERROR_STREAM_CAPTURE_CONFLICT,
                     "%s: the event is captured by another graph than stream %d; both are spoiled",
                     call, stream->id);
  }
  if (own == nullptr) {
    if (aclError error = graph.join(call, stream)) return error;
  }
  return graph.keep_wait(call, *stream, record);
}

aclError wait(const char* call, const std::shared_ptr<Stream>& stream,
              const std::shared_ptr<Event>& event) {
  SIM_REQUIRE(event->is_known_to_streams(), ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: an event with the flags 0x%x cannot be waited for by a stream", call,
              event->flags);
  if (aclError error = sim::refuse_updating(call, *stream)) return error;
  if (event->is_external()) return wait_external(call, *stream, event);
  std::shared_ptr<sim::CapturedRecord> record;
  if (auto graph = sim::capture_of(*event, &record)) {
    return wait_in_graph(call, *graph, stream, *record);
  }
  auto marker = event->recorded();
  if (stream->captured() != nullptr) {
    if (aclError error = require_capturable(call, *event)) return error;
    SIM_REQUIRE(marker == nullptr, ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                "%s: stream %d captures a graph, in which the event was not recorded", call,
                stream->id);
    return ACL_SUCCESS;
  }
  if (aclError error = sim::refuse_implicit(call, *stream)) return error;
  if (marker != nullptr) sim::device::wait(stream->queue, marker);
  return ACL_SUCCESS;
}

aclError reset(const char* call, Stream& stream, const std::shared_ptr<Event>& event) {
  SIM_REQUIRE(!event->can_be_captured, ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: events of aclrtCreateEventExWithFlag are not reset", call);
  if (aclError error = sim::refuse_updating(call, stream)) return error;
  if (event->is_external()) return reset_external(call, stream, event);
  SIM_REQUIRE(stream.captured() == nullptr, ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: stream %d captures a graph, in which no event is reset", call, stream.id);
  return sim::refuse_implicit(call, stream);
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
  return create_event("aclrtCreateEventExWithFlag", event, flags, true);
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
  if (aclError error = find_event(__func__, handle, &event)) return error;
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(__func__, stream_handle, &stream)) return error;
  return record(__func__, *stream, event);
}

aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  SIM_CALL();
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(__func__, stream_handle, &stream)) return error;
  std::shared_ptr<Event> event;
  if (aclError error = find_event(__func__, handle, &event)) return error;
  return wait(__func__, stream, event);
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream_handle) {
  SIM_CALL();
  std::shared_ptr<Event> event;
  if (aclError error = find_event(__func__, handle, &event)) return error;
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(__func__, stream_handle, &stream)) return error;
  return reset(__func__, *stream, event);
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
