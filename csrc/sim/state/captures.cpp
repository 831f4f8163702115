// SPDX-License-Identifier: Apache-2.0
#include "state/captures.h"

#include <utility>
#include <vector>

namespace sim {
namespace {

// The context's captures.
std::vector<std::shared_ptr<Graph>> captures(const Context& context) {
  std::vector<std::shared_ptr<Graph>> found;
  for (auto& [handle, graph] : graphs().all()) {
    if (graph->context == &context && graph->is_captured()) found.push_back(graph);
  }
  return found;
}

// Whether copies that wait are forbidden for this thread while the graph is captured.
bool forbids_waiting_copies(const Graph& graph) {
  aclmdlRICaptureMode exchanged = exchanged_capture_mode();
  if (graph.mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  if (exchanged == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  if (graph.thread == std::this_thread::get_id()) return true;
  return graph.mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL &&
         exchanged == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
}

}  // namespace

std::shared_ptr<Graph> capture_of(Event& event, std::shared_ptr<CapturedRecord>* record) {
  std::lock_guard<std::mutex> lock(event.mutex);
  auto graph = event.in_graph == nullptr ? nullptr : event.in_graph->graph.lock();
  if (graph == nullptr || !graph->is_captured()) return nullptr;
  if (record != nullptr) *record = event.in_graph;
  return graph;
}

aclmdlRICaptureMode& exchanged_capture_mode() {
  static thread_local aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  return mode;
}

aclError refuse_flags(const char* call, const Stream& stream) {
  constexpr uint32_t kCannotCapture = ACL_STREAM_CPU_SCHEDULE | ACL_STREAM_DEVICE_USE_ONLY;
  SIM_REQUIRE((stream.flags & kCannotCapture) == 0, ACL_ERROR_RT_INTERNAL_ERROR,
              "%s: streams with the flags 0x%x cannot capture", call, stream.flags);
  return ACL_SUCCESS;
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
  SIM_REQUIRE(capture_of(event) == nullptr, ACL_ERROR_RT_EVENT_CAPTURED,
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

aclError refuse_implicit(const char* call, const Stream& stream) {
  SIM_REQUIRE(!stream.is_default() || captures(*stream.context).empty(),
              ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
              "%s: the default stream takes no work while a stream of its context captures a "
              "graph; use another stream",
              call);
  return ACL_SUCCESS;
}

aclError refuse_updating(const char* call, const Stream& stream) {
  SIM_REQUIRE(stream.updated() == nullptr, ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT,
              "%s: stream %d updates a task group, which takes kernels alone", call, stream.id);
  return ACL_SUCCESS;
}

bool keeps_work(const Stream& stream) {
  return stream.captured() != nullptr || stream.updated() != nullptr;
}

namespace {

// Replaces the next kernel of the group when the stream gets to it.
aclError replace(const char* call, Stream& stream, TaskGroup& group, Work work) {
  if (!work.is_kernel) return refuse_updating(call, stream);
  SIM_REQUIRE(stream.updates < group.tasks.size(), ACL_ERROR_RT_INTERNAL_ERROR,
              "%s: the task group has %zu kernels, and this is one more", call, group.tasks.size());
  struct Exchange {
    std::shared_ptr<Task> task;
    std::shared_ptr<const Work> work;
  };
  auto run = [](void* argument) {
    std::unique_ptr<Exchange> exchange(static_cast<Exchange*>(argument));
    exchange->task->replace(exchange->work);
  };
  auto shared = std::make_shared<const Work>(std::move(work));
  device::submit_call(stream.queue, run, new Exchange{group.tasks[stream.updates++], shared});
  return ACL_SUCCESS;
}

}  // namespace

aclError keep(const char* call, Stream& stream, Work* work, bool* is_kept) {
  *is_kept = keeps_work(stream);
  if (auto group = stream.updated()) return replace(call, stream, *group, std::move(*work));
  if (auto graph = stream.captured()) return graph->keep(call, stream, std::move(*work));
  return refuse_implicit(call, stream);
}

}  // namespace sim
