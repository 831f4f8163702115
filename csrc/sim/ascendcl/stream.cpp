// SPDX-License-Identifier: Apache-2.0
#include <acl/acl.h>

#include <utility>

#include "error.h"
#include "faults.h"
#include "state/captures.h"
#include "state/context.h"
#include "state/machine.h"
#include "state/work.h"

using sim::Stream;

namespace {

aclError create_stream(const char* call, aclrtStream* handle, uint32_t priority, uint32_t flags) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null stream", call);
  sim::Context* context = sim::current_context();
  SIM_REQUIRE(context != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  auto stream = sim::make_stream(call, context, priority, flags);
  if (stream == nullptr) return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
  *handle = sim::streams().add(std::move(stream));
  return ACL_SUCCESS;
}

aclError destroy_stream(const char* call, aclrtStream handle, bool wait) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM,
              "%s: the default stream cannot be destroyed", call);
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(call, handle, &stream)) return error;
  if (aclError error = sim::refuse_captured(call, *stream)) return error;
  if (wait) sim::wait(*stream, -1);
  if (sim::streams().remove(handle) == nullptr) return ACL_SUCCESS;
  sim::device::destroy_stream(stream->queue);
  sim::machine::give_stream(stream->context->physical);
  return ACL_SUCCESS;
}

aclError synchronize(const char* call, aclrtStream handle, int32_t timeout_ms) {
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(call, handle, &stream)) return error;
  if (aclError error = sim::refuse_captured(call, *stream)) return error;
  if (!stream->can_be_waited_for()) return ACL_SUCCESS;
  SIM_REQUIRE(sim::wait(*stream, timeout_ms), ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
              "%s: stream %d is busy after %d ms", call, stream->id, timeout_ms);
  return sim::take_failure(call, *stream);
}

aclError launch(const char* call, aclrtStream handle, void (*function)(void*), void* argument) {
  SIM_REQUIRE(function != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null function", call);
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(call, handle, &stream)) return error;
  sim::Work work;
  work.run = [=] {
    function(argument);
    return ACL_SUCCESS;
  };
  return sim::give(call, *stream, std::move(work));
}

}  // namespace

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  SIM_CALL();
  return create_stream("aclrtCreateStream", stream, 0, 0);
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t priority, uint32_t flags) {
  SIM_CALL();
  return create_stream("aclrtCreateStreamWithConfig", stream, priority, flags);
}

aclError aclrtDestroyStream(aclrtStream stream) {
  SIM_CALL();
  return destroy_stream("aclrtDestroyStream", stream, true);
}

aclError aclrtDestroyStreamForce(aclrtStream stream) {
  SIM_CALL();
  return destroy_stream("aclrtDestroyStreamForce", stream, false);
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  SIM_CALL();
  return synchronize("aclrtSynchronizeStream", stream, -1);
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
  SIM_CALL();
  SIM_REQUIRE_TIMEOUT(timeout);
  return synchronize("aclrtSynchronizeStreamWithTimeout", stream, timeout);
}

aclError aclrtGetStreamAvailableNum(uint32_t* count) {
  SIM_CALL();
  SIM_REQUIRE(count != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null count", __func__);
  SIM_CONTEXT(context);
  *count = static_cast<uint32_t>(sim::machine::streams_left(context->physical));
  return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  SIM_CALL();
  SIM_REQUIRE(status != nullptr, ACL_ERROR_INVALID_PARAM, "aclrtStreamQuery: null status");
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream("aclrtStreamQuery", handle, &stream)) return error;
  if (aclError error = sim::refuse_captured("aclrtStreamQuery", *stream)) return error;
  if (!stream->can_be_waited_for()) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
  }
  if (aclError error = stream->context->failure("aclrtStreamQuery")) return error;
  bool idle = sim::device::completed(stream->queue) == sim::device::submitted(stream->queue);
  *status = idle ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  SIM_CALL();
  SIM_REQUIRE(id != nullptr, ACL_ERROR_RT_PARAM_INVALID, "aclrtStreamGetId: null id");
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream("aclrtStreamGetId", handle, &stream)) return error;
  *id = stream->id;
  return ACL_SUCCESS;
}

aclError aclrtStreamGetPriority(aclrtStream handle, uint32_t* priority) {
  SIM_CALL();
  SIM_REQUIRE(priority != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null priority", __func__);
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(__func__, handle, &stream)) return error;
  *priority = stream->priority;
  return ACL_SUCCESS;
}

aclError aclrtStreamGetFlags(aclrtStream handle, uint32_t* flags) {
  SIM_CALL();
  SIM_REQUIRE(flags != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null flags", __func__);
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(__func__, handle, &stream)) return error;
  *flags = stream->flags;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetStreamPriorityRange(int32_t* least, int32_t* greatest) {
  SIM_CALL();
  if (least != nullptr) *least = 7;
  if (greatest != nullptr) *greatest = 0;
  return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  SIM_CALL();
  return launch("aclrtLaunchHostFunc", stream, function, argument);
}

// The stream's own thread runs the callbacks, so the subscribed thread has nothing to do.
aclError aclrtSubscribeReport(uint64_t, aclrtStream) {
  SIM_CALL();
  return ACL_SUCCESS;
}

aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) {
  SIM_CALL();
  return ACL_SUCCESS;
}

aclError aclrtProcessReport(int32_t timeout_ms) {
  SIM_CALL();
  timespec pause = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};
  if (timeout_ms > 0) nanosleep(&pause, nullptr);
  return ACL_SUCCESS;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType,
                             aclrtStream stream) {
  SIM_CALL();
  return launch("aclrtLaunchCallback", stream, function, argument);
}

}  // extern "C"
