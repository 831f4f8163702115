// SPDX-License-Identifier: Apache-2.0
#include "work.h"

#include <utility>

#include "captures.h"

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
    if (run->execution != nullptr && run->execution->is_refused) return;
    int code = run->task->work()->run();
    if (code == ACL_SUCCESS) return;
    run->context->fail(run->execution != nullptr ? ACL_ERROR_RT_MODEL_EXECUTE : code);
  };
  std::shared_ptr<const Work> work = this->work();
  std::lock_guard<std::mutex> lock(stream.launch_mutex);
  if (work->submit) return work->submit(stream);
  if (work->launched) work->launched();
  return device::submit_call(stream.queue, run,
                             new Run{shared_from_this(), stream.context, std::move(execution)});
}

void note_uses(Stream& stream, uint64_t ticket, const Work& work) {
  for (const Range& range : work.ranges) {
    if (range.bytes > 0) stream.note_use(ticket, range.begin, range.bytes);
  }
}

aclError give(const char* call, Stream& stream, Work work) {
  bool is_kept = false;
  if (aclError error = keep(call, stream, &work, &is_kept)) return error;
  if (is_kept) return ACL_SUCCESS;
  auto task = std::make_shared<Task>(std::move(work));
  uint64_t ticket = task->submit(stream);
  note_uses(stream, ticket, *task->work());
  return ACL_SUCCESS;
}

}  // namespace sim
