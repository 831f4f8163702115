// SPDX-License-Identifier: Apache-2.0
#include "state/graph.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "error.h"
#include "state/machine.h"

namespace sim {

std::shared_ptr<Graph> Graph::capture(const char* call, const std::shared_ptr<Stream>& origin,
                                      aclmdlRICaptureMode mode) {
  if (take_stream(call, *origin->context) != ACL_SUCCESS) return nullptr;
  std::shared_ptr<Graph> graph(new Graph(origin, mode));
  graph->handle = graphs().add(graph);
  origin->capture(graph);
  return graph;
}

Graph::Graph(const std::shared_ptr<Stream>& origin, aclmdlRICaptureMode mode)
    : context(origin->context), mode(mode), is_waited_for(origin->can_be_waited_for()) {
  branches_.push_back({origin, nullptr, nullptr});
}

Graph::~Graph() {
  for (aclrtTaskGrp group : groups_) task_groups().remove(group);
  for (size_t i = 0; i < streams_; ++i) machine::give_stream(context->physical);
}

void Graph::spoil() {
  aclmdlRICaptureStatus active = ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  status.compare_exchange_strong(active, ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED);
}

Graph::Branch& Graph::branch_of(const Stream& stream) {
  return *std::find_if(branches_.begin(), branches_.end(),
                       [&](const Branch& branch) { return branch.stream.get() == &stream; });
}

aclError Graph::check_groups(const char* call, const Stream& stream, bool is_kernel) {
  SIM_REQUIRE(!is_closed_, ACL_ERROR_RT_STREAM_NOT_CAPTURED, "%s: the capture is over", call);
  for (const Branch& branch : branches_) {
    if (branch.group == nullptr) continue;
    const bool is_own = branch.stream.get() == &stream;
    if (is_own && is_kernel) continue;
    spoil();
    group_error_ = is_own ? ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT : ACL_ERROR_STREAM_TASK_GROUP_INTR;
    return fail(group_error_, "%s: %s, which has spoiled the capture", call,
                is_own ? "a task group takes kernels alone"
                       : "a task group is open on another stream of the capture");
  }
  return ACL_SUCCESS;
}

aclError Graph::keep(const char* call, const Stream& stream, Work work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (aclError error = check_groups(call, stream, work.is_kernel)) return error;
  Branch& branch = branch_of(stream);
  branch.last = nullptr;
  tasks_.push_back(std::make_shared<Task>(std::move(work)));
  if (branch.group != nullptr) branch.group->tasks.push_back(tasks_.back());
  return ACL_SUCCESS;
}

aclError Graph::keep_record(const char* call, const Stream& stream,
                            std::shared_ptr<CapturedRecord>* record) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (aclError error = check_groups(call, stream, false)) return error;
  *record = std::make_shared<CapturedRecord>();
  (*record)->graph = shared_from_this();
  branch_of(stream).last = *record;
  return ACL_SUCCESS;
}

// Tasks are kept in the order of the calls, so each one follows what it waits for.
aclError Graph::keep_wait(const char* call, const Stream& stream, CapturedRecord& record) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (aclError error = check_groups(call, stream, false)) return error;
  branch_of(stream).last = nullptr;
  record.is_waited_for = true;
  if (is_origin(stream)) record.is_waited_for_by_origin = true;
  return ACL_SUCCESS;
}

aclError Graph::join(const char* call, const std::shared_ptr<Stream>& stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  SIM_REQUIRE(!is_closed_ && status == ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE,
              ACL_ERROR_RT_INTERNAL_ERROR,
              "%s: the capture is spoiled or over, and stream %d cannot join it", call, stream->id);
  SIM_REQUIRE(stream->context == context, ACL_ERROR_RT_STREAM_CONTEXT,
              "%s: stream %d belongs to another context than the capture", call, stream->id);
  if (aclError error = take_stream(call, *context)) {
    spoil();
    return error;
  }
  ++streams_;
  branches_.push_back({stream, nullptr, nullptr});
  stream->capture(shared_from_this());
  return ACL_SUCCESS;
}

aclError Graph::begin_group(const char* call, const Stream& stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  Branch& own = branch_of(stream);
  SIM_REQUIRE(own.group == nullptr, ACL_ERROR_STREAM_TASK_GROUP_STATUS,
              "%s: a task group is open on stream %d", call, stream.id);
  if (aclError error = check_groups(call, stream, true)) return error;
  own.group = std::make_shared<TaskGroup>();
  own.group->graph = shared_from_this();
  own.last = nullptr;  // CANN records placeholders
  return ACL_SUCCESS;
}

aclError Graph::end_group(const char* call, const Stream& stream, aclrtTaskGrp* group) {
  std::lock_guard<std::mutex> lock(mutex_);
  Branch& own = branch_of(stream);
  SIM_REQUIRE(own.group != nullptr, ACL_ERROR_STREAM_TASK_GROUP_STATUS,
              "%s: no task group is open on stream %d", call, stream.id);
  std::shared_ptr<TaskGroup> ended = std::move(own.group);
  own.group = nullptr;
  if (status != ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE) {
    aclError code = group_error_ != ACL_SUCCESS ? std::exchange(group_error_, ACL_SUCCESS)
                                                : ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED;
    return fail(code, "%s: the capture is spoiled", call);
  }
  *group = task_groups().add(std::move(ended));
  groups_.push_back(*group);
  return ACL_SUCCESS;
}

void Graph::leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_closed_ = true;
  for (Branch& branch : branches_) branch.stream->capture(nullptr);
}

aclError Graph::check_joined(const char* call) const {
  std::lock_guard<std::mutex> lock(mutex_);
  bool reaches_origin = branches_.size() == 1;
  for (const Branch& branch : branches_) {
    SIM_REQUIRE(branch.group == nullptr, ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                "%s: the task group on stream %d was not ended", call, branch.stream->id);
    if (is_origin(*branch.stream)) continue;
    SIM_REQUIRE(branch.last != nullptr && branch.last->is_waited_for, ACL_ERROR_RT_STREAM_UNJOINED,
                "%s: stream %d joined the capture, and its last work is not an event that another "
                "stream of the capture waits for",
                call, branch.stream->id);
    reaches_origin = reaches_origin || branch.last->is_waited_for_by_origin;
  }
  SIM_REQUIRE(reaches_origin, ACL_ERROR_RT_STREAM_UNJOINED,
              "%s: the stream that began the capture waits for none of those that joined it", call);
  return ACL_SUCCESS;
}

void Graph::execute(const std::shared_ptr<Stream>& stream) {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::vector<std::shared_ptr<Task>> tasks = tasks_;
  lock.unlock();
  for (const auto& task : tasks) require_memory(*task->work());

  auto execution = std::make_shared<Execution>();
  execution->graph = shared_from_this();
  execution->stream = stream;
  auto submit = [&](void (*function)(Execution&)) {
    struct Step {
      std::shared_ptr<Execution> execution;
      void (*function)(Execution&);
    };
    auto run = [](void* argument) {
      std::unique_ptr<Step> step(static_cast<Step*>(argument));
      step->function(*step->execution);
    };
    return device::submit_call(stream->queue, run, new Step{execution, function});
  };

  std::lock_guard<std::recursive_mutex> in_one_piece(stream->launch_mutex);
  ++executions_;
  submit([](Execution& execution) {
    if (!execution.graph->is_running_.exchange(true)) return;
    execution.is_refused = true;
    execution.stream->failure = ACL_ERROR_RT_TS_ERROR;
  });
  for (const auto& task : tasks) task->submit(*stream, execution);
  uint64_t ticket = submit([](Execution& execution) {
    if (!execution.is_refused) execution.graph->is_running_ = false;
    --execution.graph->executions_;
  });
  for (const auto& task : tasks) note_uses(*stream, ticket, *task->work());
}

std::string Graph::json() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text = "[\n";
  for (size_t i = 0; i < tasks_.size(); ++i) {
    const std::string position = std::to_string(i);
    text += i == 0 ? "" : ",\n";
    text += "{\"name\":\"" + tasks_[i]->work()->name + "\",\"pid\":\"" + std::to_string(getpid()) +
            " aclGraph\",\"tid\":\"stream0\",\"ts\":" + position + ",\"dur\":1,\"ph\":\"X\"," +
            "\"args\":{\"Task Id\":" + position + "}}";
  }
  return text + "]";
}

Handles<Graph>& graphs() {
  static auto* once = new Handles<Graph>(0x56);
  return *once;
}

Handles<TaskGroup>& task_groups() {
  static auto* once = new Handles<TaskGroup>(0x57);
  return *once;
}

void drop_graphs(const Context& context) {
  for (auto& [handle, graph] : graphs().all()) {
    if (graph->context != &context) continue;
    graph->leave();
    graphs().remove(handle);
  }
}

}  // namespace sim
