// SPDX-License-Identifier: Apache-2.0
//
// Contexts, streams and events of this process.
#pragma once

#include <acl/acl_rt.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "control.h"
#include "device.h"
#include "handles.h"

namespace sim {

struct CapturedRecord;
struct Context;
class Graph;
struct TaskGroup;

struct Stream {
  Context* context;
  device::Stream* queue;
  int32_t id;
  uint32_t priority;
  uint32_t flags;
  std::atomic<int> failure{0};  // of work that failed after its launch; reported to the next wait

  // Waits for streams with work of the device's own processors return at once.
  bool can_be_waited_for() const {
    constexpr uint32_t kOfTheDevice =
        ACL_STREAM_PERSISTENT | ACL_STREAM_CPU_SCHEDULE | ACL_STREAM_DEVICE_USE_ONLY;
    return (flags & kOfTheDevice) == 0;
  }

  bool is_default() const;

  // The graph that it captures, or null.
  std::shared_ptr<Graph> captured() const { return std::atomic_load(&captured_); }
  void capture(std::shared_ptr<Graph> graph) { std::atomic_store(&captured_, std::move(graph)); }

  // The task group whose kernels its launches replace, or null.
  std::shared_ptr<TaskGroup> updated() const { return std::atomic_load(&updated_); }
  void update(std::shared_ptr<TaskGroup> group) { std::atomic_store(&updated_, std::move(group)); }
  size_t updates = 0;  // launches since then

  // Work in flight and the memory that it uses.
  struct Use {
    uint64_t ticket;
    const char* begin;
    const char* end;
  };
  std::recursive_mutex launch_mutex;  // held while work is submitted
  std::mutex uses_mutex;
  std::deque<Use> uses;

  void note_use(uint64_t ticket, const void* begin, size_t bytes);
  bool uses_range(const void* begin, size_t bytes);

 private:
  std::shared_ptr<Graph> captured_;
  std::shared_ptr<TaskGroup> updated_;
};

struct Context {
  int index;     // of the visible device
  int physical;  // the machine's device
  bool primary;
  int references = 0;  // for a primary context: its aclrtSetDevice calls
  std::atomic<bool> alive{true};
  aclrtContext handle = nullptr;
  std::shared_ptr<Stream> default_stream;

  // Work on the device failed, for the reason in this thread's recent message. Its results are
  // missing, so every later wait for the device must fail.
  void fail(aclError code);
  aclError failure(const char* call);  // ACL_SUCCESS if nothing has failed

 private:
  std::atomic<aclError> failure_{ACL_SUCCESS};
  std::string failure_reason_;
};

struct Event {
  const uint32_t flags;
  const bool can_be_captured;  // made by aclrtCreateEventExWithFlag
  std::mutex mutex;
  std::shared_ptr<device::Marker> marker;    // of the last record, or null
  std::shared_ptr<CapturedRecord> in_graph;  // of the last record in a capture, or null

  // For an external event (ACL_EVENT_EXTERNAL): streams set it, wait until it is set, and reset it.
  std::condition_variable changed;
  bool is_set = false;

  Event(uint32_t flags, bool can_be_captured) : flags(flags), can_be_captured(can_be_captured) {}

  bool is_external() const { return (flags & ACL_EVENT_EXTERNAL) != 0; }
  bool is_known_to_streams() const {
    return (flags & (ACL_EVENT_SYNC | ACL_EVENT_EXTERNAL | ACL_EVENT_IPC)) != 0;
  }

  std::shared_ptr<device::Marker> recorded() {
    std::lock_guard<std::mutex> lock(mutex);
    return marker;
  }
};

Handles<Stream>& streams();
Handles<Event>& events();
Handles<Context>& contexts();

Context* current_context();  // of this thread, or null

// Waits; a negative timeout waits for ever. Returns false on a timeout. Locks that kernels may
// need, such as the GIL, are released meanwhile (npuSimSetWaitHooks).
bool wait(const Stream& stream, int64_t timeout_ms);
bool wait(const device::Marker& marker, int64_t timeout_ms);

class Waiting {
 public:
  Waiting();
  ~Waiting();
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

 private:
  const npuSimWaitHooks* const hooks_;
  void* const held_;
};

// Allocates one of the device's streams.
aclError take_stream(const char* call, const Context& context);

// Null if the device has no stream left, as the thread's recent message says.
std::shared_ptr<Stream> make_stream(const char* call, Context* context, uint32_t priority,
                                    uint32_t flags);

// Creates a stream for which a device stream is already allocated.
std::shared_ptr<Stream> new_stream(Context* context, uint32_t priority, uint32_t flags);

// The stream behind a handle (null: the default stream) if it belongs to the current context.
aclError find_stream(const char* call, aclrtStream handle, std::shared_ptr<Stream>* stream);

// Aborts if work in flight on any stream uses the range. On hardware this causes a device fault or
// silent corruption.
void require_unused(const char* call, const void* begin, size_t bytes);

// Waits for the context's streams that can be waited for; a negative timeout waits for ever.
// Returns the error of failed work.
aclError synchronize(const char* call, const Context& context, int64_t timeout_ms);

// Returns the error of the stream's work that failed after its launch, once.
aclError take_failure(const char* call, Stream& stream);

}  // namespace sim

// Returns an error from calls that need a context.
#define SIM_CONTEXT(context)                                                             \
  ::sim::Context* context = ::sim::current_context();                                    \
  if (context == nullptr) {                                                              \
    return ::sim::fail(ACL_ERROR_RT_CONTEXT_NULL,                                        \
                       "%s: this thread has no context; call aclrtSetDevice", __func__); \
  }

// A timeout in ms: -1 is for ever, 0 is none.
#define SIM_REQUIRE_TIMEOUT(timeout)                                                          \
  SIM_REQUIRE((timeout) == -1 || (timeout) > 0, ACL_ERROR_RT_PARAM_INVALID, "%s: timeout %d", \
              __func__, timeout)

#define SIM_REQUIRE(condition, code, ...)                    \
  do {                                                       \
    if (!(condition)) return ::sim::fail(code, __VA_ARGS__); \
  } while (false)
