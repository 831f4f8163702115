// SPDX-License-Identifier: Apache-2.0
//
// Graphs: capturing, executing, updating and describing them.
#include <acl/acl.h>
#include <time.h>

#include <fstream>
#include <mutex>
#include <utility>

#include "error.h"
#include "faults.h"
#include "state/captures.h"
#include "state/context.h"

using sim::Graph;
using sim::Stream;

namespace {

// Held while a capture begins or ends.
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
  return sim::refuse_flags(call, **stream);
}

// Finds a graph of this thread's context.
aclError find_graph(const char* call, aclmdlRI handle, std::shared_ptr<Graph>* graph) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null graph", call);
  sim::Context* context = sim::current_context();
  SIM_REQUIRE(context != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  *graph = sim::graphs().find(handle);
  SIM_REQUIRE(*graph != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a graph, or was destroyed", call, handle);
  SIM_REQUIRE((*graph)->context == context, ACL_ERROR_RT_MODEL_CONTEXT,
              "%s: the graph belongs to another context than this thread's", call);
  return ACL_SUCCESS;
}

aclError find_complete_graph(const char* call, aclmdlRI handle, std::shared_ptr<Graph>* graph) {
  if (aclError error = find_graph(call, handle, graph)) return error;
  SIM_REQUIRE(!(*graph)->is_captured(), ACL_ERROR_RT_MODEL_CAPTURED,
              "%s: the graph is being captured; call aclmdlRICaptureEnd first", call);
  return ACL_SUCCESS;
}

aclError find_graph_of(const char* call, aclrtStream handle, std::shared_ptr<Stream>* stream,
                       std::shared_ptr<Graph>* graph) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null stream", call);
  if (aclError error = sim::find_stream(call, handle, stream)) return error;
  *graph = (*stream)->captured();
  SIM_REQUIRE(*graph != nullptr, ACL_ERROR_RT_STREAM_NOT_CAPTURED, "%s: stream %d captures nothing",
              call, (*stream)->id);
  return ACL_SUCCESS;
}

// Finds a stream that replaces kernels or may do so.
aclError find_updating_stream(const char* call, aclrtStream handle,
                              std::shared_ptr<Stream>* stream) {
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null stream", call);
  if (aclError error = sim::find_stream(call, handle, stream)) return error;
  return sim::refuse_captured(call, **stream);
}

aclError check_complete(const char* call, const Graph& graph) {
  SIM_REQUIRE(graph.status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE,
              ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
              "%s: a call that was refused has spoiled the capture", call);
  return graph.check_joined(call);
}

bool wait_until_executed(const Graph& graph) {
  constexpr int kPatienceMs = 10000;
  constexpr timespec kPause = {0, 1000000};
  sim::Waiting waiting;
  for (int waited = 0; graph.is_executed(); ++waited) {
    if (waited >= kPatienceMs) return false;
    nanosleep(&kPause, nullptr);
  }
  return true;
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
  bool is_begun = Graph::capture(__func__, stream, mode) != nullptr;
  return is_begun ? ACL_SUCCESS : ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status,
                                aclmdlRI* graph_handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null stream", __func__);
  SIM_REQUIRE(status != nullptr || graph_handle != nullptr, ACL_ERROR_INVALID_PARAM,
              "%s: null status and null graph", __func__);
  auto stream = sim::streams().find(handle);  // in any context
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
  SIM_REQUIRE(graph->is_origin(*stream), ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED,
              "%s: stream %d joined the capture, which ends on the stream that began it", __func__,
              stream->id);
  graph->leave();
  // In CANN such a graph stays with its context: only a handle from aclmdlRICaptureGetInfo frees
  // it.
  const bool may_end = graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED ||
                       graph->thread == std::this_thread::get_id();
  const aclError error =
      may_end ? check_complete(__func__, *graph)
              : sim::fail(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD,
                          "%s: another thread began the capture of stream %d, which is dropped",
                          __func__, stream->id);
  if (error == ACL_SUCCESS) {
    *graph_handle = graph->handle;
  } else if (may_end) {
    sim::graphs().remove(graph->handle);
  }
  graph->status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  return error;
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

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream_handle) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null graph", __func__);
  std::shared_ptr<Stream> stream;
  aclError found = sim::find_stream(__func__, stream_handle, &stream);
  if (stream != nullptr) {
    if (aclError error = sim::refuse_captured(__func__, *stream)) return error;
  }
  std::shared_ptr<Graph> graph;
  if (aclError error = find_complete_graph(__func__, handle, &graph)) return error;
  if (found != ACL_SUCCESS) return found;
  if (aclError error = sim::refuse_updating(__func__, *stream)) return error;
  if (aclError error = sim::refuse_implicit(__func__, *stream)) return error;
  graph->execute(stream);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecute(aclmdlRI handle, int32_t timeout) {
  SIM_CALL();
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null graph", __func__);
  SIM_REQUIRE(sim::graphs().find(handle) != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a graph, or was destroyed", __func__, handle);
  SIM_REQUIRE_TIMEOUT(timeout);
  return sim::fail(ACL_ERROR_RT_PARAM_INVALID,
                   "%s: a captured graph is executed by aclmdlRIExecuteAsync alone", __func__);
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
  SIM_CALL();
  std::shared_ptr<Graph> graph;
  if (aclError error = find_complete_graph(__func__, handle, &graph)) return error;
  SIM_REQUIRE(wait_until_executed(*graph), ACL_ERROR_RT_MODEL_RUNNING,
              "%s: the graph is still executed", __func__);
  sim::graphs().remove(handle);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<Stream> stream;
  std::shared_ptr<Graph> graph;
  if (aclError error = find_graph_of(__func__, handle, &stream, &graph)) return error;
  return graph->begin_group(__func__, *stream);
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* group_handle) {
  SIM_CALL();
  SIM_REQUIRE(group_handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null group", __func__);
  *group_handle = nullptr;
  std::shared_ptr<Stream> stream;
  std::shared_ptr<Graph> graph;
  if (aclError error = find_graph_of(__func__, handle, &stream, &graph)) return error;
  return graph->end_group(__func__, *stream, group_handle);
}

// CANN does not check the group's handle, even if its graph is still being captured or was
// destroyed.
aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group_handle) {
  SIM_CALL();
  SIM_REQUIRE(group_handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null group", __func__);
  std::shared_ptr<Stream> stream;
  if (aclError error = find_updating_stream(__func__, handle, &stream)) return error;
  auto group = sim::task_groups().find(group_handle);
  auto graph = group == nullptr ? nullptr : group->graph.lock();
  if (graph == nullptr || graph->is_captured() || sim::graphs().find(graph->handle) == nullptr) {
    sim::fault("%s: %p is not a task group of a captured graph, or the graph was destroyed",
               __func__, group_handle);
  }
  SIM_REQUIRE(stream->updated() == nullptr && !group->is_updated.exchange(true),
              ACL_ERROR_STREAM_TASK_GROUP_STATUS,
              "%s: stream %d or the task group is being updated", __func__, stream->id);
  stream->updates = 0;
  stream->update(group);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<Stream> stream;
  if (aclError error = find_updating_stream(__func__, handle, &stream)) return error;
  auto group = stream->updated();
  SIM_REQUIRE(group != nullptr, ACL_ERROR_STREAM_TASK_GROUP_STATUS,
              "%s: stream %d updates no task group", __func__, stream->id);
  stream->update(nullptr);
  group->is_updated = false;
  SIM_REQUIRE(stream->updates == group->tasks.size(), ACL_ERROR_RT_INTERNAL_ERROR,
              "%s: %zu of %zu kernels of the task group were exchanged", __func__, stream->updates,
              group->tasks.size());
  return ACL_SUCCESS;
}

aclError aclmdlRIDebugPrint(aclmdlRI handle) {
  SIM_CALL();
  std::shared_ptr<Graph> graph;
  return find_graph(__func__, handle, &graph);  // CANN writes to its own log
}

aclError aclmdlRIDebugJsonPrint(aclmdlRI handle, const char* path, uint32_t) {
  SIM_CALL();
  SIM_REQUIRE(path != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null path", __func__);
  std::shared_ptr<Graph> graph;
  if (aclError error = find_graph(__func__, handle, &graph)) return error;
  std::ofstream file(path);
  SIM_REQUIRE(file.is_open(), ACL_ERROR_RT_PARAM_INVALID, "%s: cannot write %s", __func__, path);
  file << graph->json();
  return ACL_SUCCESS;
}

}  // extern "C"
