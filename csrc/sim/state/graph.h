// SPDX-License-Identifier: Apache-2.0
//
// Graphs: the work that streams captured, and its execution.
#pragma once

#include <acl/acl_rt.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "handles.h"
#include "state/context.h"
#include "state/work.h"

namespace sim {

// An event recorded in a capture.
struct CapturedRecord {
  std::weak_ptr<Graph> graph;
  bool is_waited_for = false;
  bool is_waited_for_by_origin = false;
};

// The object of an aclrtTaskGrp: kernels of a graph that can be replaced.
struct TaskGroup {
  std::weak_ptr<Graph> graph;
  std::vector<std::shared_ptr<Task>> tasks;
  std::atomic<bool> is_updated{false};  // a stream is updating it now
};

// The object of an aclmdlRI. As long as it lives, it uses another stream of the device for each
// captured stream.
class Graph : public std::enable_shared_from_this<Graph> {
 public:
  Context* const context;
  const aclmdlRICaptureMode mode;
  const bool is_waited_for;  // whether synchronising the device waits for its stream
  const std::thread::id thread = std::this_thread::get_id();  // the one that began the capture
  aclmdlRI handle = nullptr;
  std::atomic<aclmdlRICaptureStatus> status{ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE};  // NONE: ended

  // Null if the device has no stream left.
  static std::shared_ptr<Graph> capture(const char* call, const std::shared_ptr<Stream>& origin,
                                        aclmdlRICaptureMode mode);
  ~Graph();

  bool is_captured() const { return status != ACL_MODEL_RI_CAPTURE_STATUS_NONE; }
  void spoil();  // reported at the end of the capture
  bool is_origin(const Stream& stream) const { return branches_.front().stream.get() == &stream; }

  // The operations of a capturing stream. Each refuses what a task group does not accept.
  aclError keep(const char* call, const Stream& stream, Work work);
  aclError keep_record(const char* call, const Stream& stream,
                       std::shared_ptr<CapturedRecord>* record);
  aclError keep_wait(const char* call, const Stream& stream, CapturedRecord& record);
  aclError join(const char* call, const std::shared_ptr<Stream>& stream);

  aclError begin_group(const char* call, const Stream& stream);
  aclError end_group(const char* call, const Stream& stream, aclrtTaskGrp* group);

  void leave();  // all streams leave the capture
  aclError check_joined(const char* call) const;

  // Submits all tasks to the stream.
  void execute(const std::shared_ptr<Stream>& stream);
  bool is_executed() const { return executions_ > 0; }

  std::string json() const;

 private:
  // A stream of the capture, the origin first.
  struct Branch {
    std::shared_ptr<Stream> stream;
    std::shared_ptr<CapturedRecord> last;  // its last operation, if that was recording an event
    std::shared_ptr<TaskGroup> group;      // the open one
  };

  Graph(const std::shared_ptr<Stream>& origin, aclmdlRICaptureMode mode);
  Branch& branch_of(const Stream& stream);
  aclError check_groups(const char* call, const Stream& stream, bool is_kernel);

  mutable std::mutex mutex_;
  std::vector<Branch> branches_;
  size_t streams_ = 1;  // of the device
  std::vector<std::shared_ptr<Task>> tasks_;
  std::vector<aclrtTaskGrp> groups_;
  bool is_closed_ = false;  // nothing can be added any more
  aclError group_error_ = ACL_SUCCESS;
  std::atomic<int> executions_{0};
  std::atomic<bool> is_running_{false};
};

Handles<Graph>& graphs();
Handles<TaskGroup>& task_groups();
void drop_graphs(const Context& context);

}  // namespace sim
