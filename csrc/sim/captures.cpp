// SPDX-License-Identifier: Apache-2.0
#include "captures.h"

#include "machine.h"

namespace sim {
namespace {

// Of the context.
std::vector<std::shared_ptr<Graph>> captures(const Context& context) {
  std::vector<std::shared_ptr<Graph>> found;
  for (auto& [handle, graph] : graphs().all()) {
    if (graph->context == &context && graph->is_captured()) found.push_back(graph);
  }
  return found;
}

// Whether this thread may not copy and wait while the graph is captured.
bool forbids_waiting_copies(const Graph& graph) {
  aclmdlRICaptureMode exchanged = exchanged_capture_mode();
  if (graph.mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  if (exchanged == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  if (graph.thread == std::this_thread::get_id()) return true;
  return graph.mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL &&
         exchanged == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
}

bool is_default(const Stream& stream) { return &stream == stream.context->default_stream.get(); }

}  // namespace

Graph::Graph(const Stream& stream, aclmdlRICaptureMode mode)
    : context(stream.context), mode(mode), is_waited_for(stream.can_be_waited_for()) {}

Graph::~Graph() { machine::give_stream(context->physical); }

void Graph::spoil() {
  aclmdlRICaptureStatus active = ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  status.compare_exchange_strong(active, ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED);
}

Handles<Graph>& graphs() {
  static auto* once = new Handles<Graph>(0x56);
  return *once;
}

void drop_graphs(const Context& context) {
  for (auto& [handle, graph] : graphs().all()) {
    if (graph->context == &context) graphs().remove(handle);
  }
}

aclmdlRICaptureMode& exchanged_capture_mode() {
  static thread_local aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  return mode;
}

aclError refuse_captured(const char* call, const Stream& stream) {
  SIM_REQUIRE(stream.captured() == nullptr, ACL_ERROR_RT_STREAM_CAPTURED,
              "%s: stream %d captures a graph; call aclmdlRICaptureEnd first", call, stream.id);
  return ACL_SUCCESS;
}

aclError refuse_captured(const char* call, const Context& context) {
  for (auto& graph : captures(context)) {
    SIM_REQUIRE(!graph->is_waited_for, ACL_ERROR_RT_STREAM_CAPTURED,
                "%s: a stream of this context captures a graph; call aclmdlRICaptureEnd first",
                call);
  }
  return ACL_SUCCESS;
}

aclError refuse_captured(const char* call, Event& event) {
  auto graph = event.captured();
  SIM_REQUIRE(graph == nullptr || !graph->is_captured(), ACL_ERROR_RT_EVENT_CAPTURED,
              "%s: the event was recorded on a stream that captures a graph", call);
  return ACL_SUCCESS;
}

aclError refuse_waiting_copy(const char* call, const Context& context, aclError code) {
  bool refused = false;
  for (auto& graph : captures(context)) {
    if (!forbids_waiting_copies(*graph)) continue;
    graph->spoil();
    refused = true;
  }
  SIM_REQUIRE(!refused, code,
              "%s: a stream of this context captures a graph, which this call has spoiled; set "
              "this thread to ACL_MODEL_RI_CAPTURE_MODE_RELAXED first "
              "(aclmdlRICaptureThreadExchangeMode)",
              call);
  return ACL_SUCCESS;
}

aclError refuse_joining(const char* call, const Stream& stream) {
  SIM_REQUIRE(!is_default(stream), ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
              "%s: the default stream cannot capture, and so not wait for a captured event", call);
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: the event is captured, and the simulator does not let another stream join a "
              "capture yet",
              call);
}

aclError refuse_recording(const char* call, const Stream& stream) {
  if (auto graph = stream.captured()) {
    graph->spoil();
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                "%s: stream %d captures a graph, and the simulator does not record work yet; the "
                "capture is spoiled",
                call, stream.id);
  }
  SIM_REQUIRE(!is_default(stream) || captures(*stream.context).empty(),
              ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
              "%s: the default stream takes no work while a stream of its context captures a "
              "graph; use another stream",
              call);
  return ACL_SUCCESS;
}

}  // namespace sim
