// SPDX-License-Identifier: Apache-2.0
#include "state/context.h"

#include <time.h>

#include <algorithm>

#include "error.h"
#include "settings.h"
#include "state/machine.h"

namespace sim {

bool Stream::is_default() const { return this == context->default_stream.get(); }

void Stream::note_use(uint64_t ticket, const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> lock(uses_mutex);
  uint64_t completed = device::completed(queue);
  while (!uses.empty() && uses.front().ticket <= completed) uses.pop_front();
  auto* first = static_cast<const char*>(begin);
  uses.push_back({ticket, first, first + bytes});
}

bool Stream::uses_range(const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> lock(uses_mutex);
  uint64_t completed = device::completed(queue);
  auto* first = static_cast<const char*>(begin);
  return std::any_of(uses.begin(), uses.end(), [&](const Use& use) {
    return use.ticket > completed && use.begin < first + bytes && first < use.end;
  });
}

void Context::fail(aclError code) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (failure_ != ACL_SUCCESS) return;
  failure_reason_ = take_recent_message();
  failure_ = code;
}

aclError Context::failure(const char* call) {
  aclError code = failure_;
  if (code == ACL_SUCCESS) return code;
  return sim::fail(code, "%s: work on the device failed before: %s", call, failure_reason_.c_str());
}

Handles<Stream>& streams() {
  static auto* once = new Handles<Stream>(0x51);
  return *once;
}

Handles<Event>& events() {
  static auto* once = new Handles<Event>(0x52);
  return *once;
}

Handles<Context>& contexts() {
  static auto* once = new Handles<Context>(0x53);
  return *once;
}

namespace {

std::atomic<const npuSimWaitHooks*> hooks{nullptr};

}  // namespace

Waiting::Waiting() : hooks_(hooks), held_(hooks_ == nullptr ? nullptr : hooks_->begin()) {}

Waiting::~Waiting() {
  if (hooks_ != nullptr) hooks_->end(held_);
}

bool wait(const Stream& stream, int64_t timeout_ms) {
  if (device::completed(stream.queue) == device::submitted(stream.queue)) return true;
  Waiting waiting;
  return device::synchronize(stream.queue, timeout_ms);
}

bool wait(const device::Marker& marker, int64_t timeout_ms) {
  if (device::reached(marker)) return true;
  Waiting waiting;
  return device::synchronize(marker, timeout_ms);
}

aclError take_stream(const char* call, const Context& context) {
  SIM_REQUIRE(
      machine::take_stream(context.physical), ACL_ERROR_RT_RESOURCE_ALLOC_FAIL,
      "%s: Alloc sq cq fail: too many streams are created, the device has %zu for all processes",
      call, settings().streams);
  return ACL_SUCCESS;
}

std::shared_ptr<Stream> make_stream(const char* call, Context* context, uint32_t priority,
                                    uint32_t flags) {
  if (take_stream(call, *context) != ACL_SUCCESS) return nullptr;
  return new_stream(context, priority, flags);
}

std::shared_ptr<Stream> new_stream(Context* context, uint32_t priority, uint32_t flags) {
  static std::atomic<int32_t> next_id{0};
  auto stream = std::make_shared<Stream>();
  stream->context = context;
  stream->queue = device::create_stream(context->physical);
  stream->id = next_id++;
  stream->priority = priority;
  stream->flags = flags;
  return stream;
}

aclError find_stream(const char* call, aclrtStream handle, std::shared_ptr<Stream>* stream) {
  Context* context = current_context();
  SIM_REQUIRE(context != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  if (handle == nullptr) {
    *stream = context->default_stream;
    return ACL_SUCCESS;
  }
  *stream = streams().find(handle);
  SIM_REQUIRE(*stream != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a stream, or was destroyed", call, handle);
  SIM_REQUIRE((*stream)->context == context, ACL_ERROR_RT_STREAM_CONTEXT,
              "%s: the stream belongs to another context than this thread's", call);
  return ACL_SUCCESS;
}

namespace {

template <typename Function>
void for_each_stream(Function function) {
  for (auto& [handle, context] : contexts().all()) function(*context->default_stream);
  for (auto& [handle, stream] : streams().all()) function(*stream);
}

int64_t now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

}  // namespace

void require_unused(const char* call, const void* begin, size_t bytes) {
  for_each_stream([&](Stream& stream) {
    if (!stream.uses_range(begin, bytes)) return;
    fault(
        "%s(%p): work of stream %d that is not complete uses this memory (%zu bytes); the call "
        "does not synchronise, synchronise first",
        call, begin, stream.id, bytes);
  });
}

aclError take_failure(const char* call, Stream& stream) {
  if (int code = stream.failure.exchange(0)) {
    return fail(code, "%s: work of stream %d failed", call, stream.id);
  }
  return stream.context->failure(call);
}

aclError synchronize(const char* call, const Context& context, int64_t timeout_ms) {
  int64_t deadline = now_ms() + timeout_ms;
  bool done = true;
  aclError first = ACL_SUCCESS;
  for_each_stream([&](Stream& stream) {
    if (stream.context != &context || !stream.can_be_waited_for()) return;
    int64_t left = timeout_ms < 0 ? -1 : std::max<int64_t>(deadline - now_ms(), 0);
    done = done && wait(stream, left);
    if (!done) return;
    aclError error = take_failure(call, stream);
    if (first == ACL_SUCCESS) first = error;
  });
  SIM_REQUIRE(done, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "%s: the device is busy after %lld ms", call,
              static_cast<long long>(timeout_ms));
  return first;
}

}  // namespace sim

extern "C" void npuSimSetWaitHooks(const npuSimWaitHooks* wanted) { sim::hooks = wanted; }
