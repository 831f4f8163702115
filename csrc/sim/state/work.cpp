// SPDX-License-Identifier: Apache-2.0
#include "state/work.h"

#include <utility>

#include "error.h"
#include "state/captures.h"
#include "state/memory.h"

namespace sim {

std::shared_ptr<const Work> Task::work() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return work_;
}

void Task::replace(std::shared_ptr<const Work> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  work_ = std::move(work);
}

uint64_t Task::submit(Stream& stream, std::shared_ptr<const Execution> execution) {
  struct Run {
    std::shared_ptr<Task> task;
    Context* context;
    std::shared_ptr<const Execution> execution;
  };
  auto run = [](void* argument) {
    std::unique_ptr<Run> run(static_cast<Run*>(argument));
    std::shared_ptr<const Work> work = run->task->work();
    const bool is_in_graph = run->execution != nullptr;
    if (is_in_graph && run->execution->is_refused) {
      if (work->skip) work->skip();
      return;
    }
    if (is_in_graph) require_memory(*work);
    int code = work->run();
    if (code != ACL_SUCCESS) run->context->fail(is_in_graph ? ACL_ERROR_RT_MODEL_EXECUTE : code);
  };
  std::shared_ptr<const Work> work = this->work();
  std::lock_guard<std::recursive_mutex> lock(stream.launch_mutex);
  if (work->submit && execution == nullptr) return work->submit(stream);
  if (work->launched) work->launched();
  return device::submit_call(stream.queue, run,
                             new Run{shared_from_this(), stream.context, std::move(execution)});
}

void require_memory(const Work& work) {
  for (const Range& range : work.ranges) {
    bool is_there =
        range.on_device ? is_device_range(range.begin, range.bytes) : is_known_host(range.begin);
    if (is_there) continue;
    fault(
        "%s in a graph: [%p, +%zu) is no %s any more; what a graph uses has to stay where it was "
        "captured",
        work.name.c_str(), range.begin, range.bytes,
        range.on_device ? "mapped device memory" : "page-locked memory");
  }
}

void note_uses(Stream& stream, uint64_t ticket, const Work& work) {
  for (const Range& range : work.ranges) {
    if (range.bytes > 0) stream.note_use(ticket, range.begin, range.bytes);
  }
}

aclError give(const char* call, Stream& stream, Work work) {
  work.name = call;
  bool is_kept = false;
  if (aclError error = keep(call, stream, &work, &is_kept)) return error;
  if (is_kept) return ACL_SUCCESS;
  auto task = std::make_shared<Task>(std::move(work));
  std::lock_guard<std::recursive_mutex> lock(stream.launch_mutex);
  uint64_t ticket = task->submit(stream);
  note_uses(stream, ticket, *task->work());
  return ACL_SUCCESS;
}

}  // namespace sim
