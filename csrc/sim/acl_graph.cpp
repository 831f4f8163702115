// SPDX-License-Identifier: Apache-2.0
//
// Capturing graphs: the state alone. Work is not recorded, and graphs are not executed, so the
// functions that do so are absent.
#include <acl/acl.h>

#include <mutex>
#include <utility>

#include "captures.h"
#include "context.h"
#include "error.h"
#include "faults.h"

using sim::Graph;
using sim::Stream;

namespace {

// Held to begin and to end a capture.
std::mutex& capture_mutex() {
  static auto* once = new std::mutex;
  return *once;
}

aclError check_mode(const char* call, aclmdlRICaptureMode mode) {
  bool is_mode =
      mode >= ACL_MODEL_RI_CAPTURE_MODE_GLOBAL && mode <= ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
  SIM_REQUIRE(is_mode, ACL_ERROR_RT_PARAM_INVALID, "%s: unknown mode %d", call,
              static_cast<int>(mode));
  return ACL_SUCCESS;
}

aclError find_capturing_stream(const char* call, aclrtStream handle,
                               std::shared_ptr<Stream>* stream) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM,
              "%s: null stream; the default stream cannot capture", call);
  if (aclError error = sim::find_stream(call, handle, stream)) return error;
  constexpr uint32_t kCannotCapture = ACL_STREAM_CPU_SCHEDULE | ACL_STREAM_DEVICE_USE_ONLY;
  SIM_REQUIRE(((*stream)->flags & kCannotCapture) == 0, ACL_ERROR_RT_INTERNAL_ERROR,
              "%s: streams with the flags 0x%x cannot capture", call, (*stream)->flags);
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  SIM_CALL();
  std::shared_ptr<Stream> stream;
  if (aclError error = find_capturing_stream(__func__, handle, &stream)) return error;
  if (aclError error = check_mode(__func__, mode)) return error;
  std::lock_guard<std::mutex> lock(capture_mutex());
  if (aclError error = sim::refuse_captured(__func__, *stream)) return error;
  if (aclError error = sim::take_stream(__func__, *stream->context)) return error;
  auto graph = std::make_shared<Graph>(*stream, mode);
  graph->handle = sim::graphs().add(graph);
  stream->capture(graph);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status,
                                aclmdlRI* graph_handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null stream", __func__);
  SIM_REQUIRE(status != nullptr || graph_handle != nullptr, ACL_ERROR_INVALID_PARAM,
              "%s: null status and null graph", __func__);
  auto stream = sim::streams().find(handle);  // of any context
  SIM_REQUIRE(stream != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a stream, or was destroyed", __func__, handle);
  auto graph = stream->captured();
  if (status != nullptr) *status = graph ? graph->status.load() : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph_handle != nullptr) *graph_handle = graph ? graph->handle : nullptr;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* graph_handle) {
  SIM_CALL();
  std::shared_ptr<Stream> stream;
  if (aclError error = find_capturing_stream(__func__, handle, &stream)) return error;
  std::lock_guard<std::mutex> lock(capture_mutex());
  auto graph = stream->captured();
  SIM_REQUIRE(graph != nullptr, ACL_ERROR_RT_STREAM_NOT_CAPTURED, "%s: stream %d captures nothing",
              __func__, stream->id);
  SIM_REQUIRE(graph_handle != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null graph", __func__);
  *graph_handle = nullptr;
  stream->capture(nullptr);
  aclmdlRICaptureStatus status = graph->status.exchange(ACL_MODEL_RI_CAPTURE_STATUS_NONE);
  // CANN leaves such a graph to its context: only a handle from aclmdlRICaptureGetInfo frees it.
  SIM_REQUIRE(graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED ||
                  graph->thread == std::this_thread::get_id(),
              ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD,
              "%s: another thread began the capture of stream %d, which is dropped", __func__,
              stream->id);
  if (status == ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED) {
    sim::graphs().remove(graph->handle);
    return sim::fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                     "%s: a call that was refused has spoiled the capture of stream %d", __func__,
                     stream->id);
  }
  *graph_handle = graph->handle;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  SIM_CALL();
  SIM_REQUIRE(mode != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null mode", __func__);
  if (aclError error = check_mode(__func__, *mode)) return error;
  SIM_CONTEXT(context);
  (void)context;
  std::swap(*mode, sim::exchanged_capture_mode());
  return ACL_SUCCESS;
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null graph", __func__);
  SIM_CONTEXT(context);
  auto graph = sim::graphs().find(handle);
  SIM_REQUIRE(graph != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a graph, or was destroyed", __func__, handle);
  SIM_REQUIRE(graph->context == context, ACL_ERROR_RT_MODEL_CONTEXT,
              "%s: the graph belongs to another context than this thread's", __func__);
  SIM_REQUIRE(!graph->is_captured(), ACL_ERROR_RT_MODEL_CAPTURED,
              "%s: the graph is being captured; call aclmdlRICaptureEnd first", __func__);
  sim::graphs().remove(handle);
  return ACL_SUCCESS;
}

}  // extern "C"
