// SPDX-License-Identifier: Apache-2.0
//
// The work of streams: copies, fills and kernels. It is submitted to the device at once, or kept by
// a captured graph, which submits it at each execution.
#pragma once

#include <acl/acl_rt.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "state/context.h"

namespace sim {

struct Range {
  const void* begin;
  size_t bytes;
  bool on_device;  // otherwise page-locked host memory
};

struct Work {
  std::vector<Range> ranges;  // in use until the work has completed

  // Runs on the stream's own thread. A result other than 0 is an error of the context.
  std::function<int()> run;
  // Used instead of `run` outside graphs, unless null: submits it to the device and returns a
  // ticket.
  std::function<uint64_t(Stream&)> submit;
  std::function<void()> launched;  // called when it is given to a stream, unless null
  std::function<void()> skip;      // called if it is skipped, unless null
  bool is_kernel = false;          // runs on the device's cores, so a task group accepts it

  std::string name;  // of the call that submitted it, for messages
};

// An execution of a graph.
struct Execution {
  std::shared_ptr<Graph> graph;
  std::shared_ptr<Stream> stream;
  std::atomic<bool> is_refused{false};  // because the graph is running on another stream
};

// Work that is submitted to streams, by a graph many times. What runs is looked up at its turn, so
// that an update also affects waiting executions.
class Task : public std::enable_shared_from_this<Task> {
 public:
  explicit Task(Work work) : work_(std::make_shared<const Work>(std::move(work))) {}

  std::shared_ptr<const Work> work() const;
  void replace(std::shared_ptr<const Work> work);

  // Does not record its ranges. If it fails, the context's error is that of the graph, or without a
  // graph its result.
  uint64_t submit(Stream& stream, std::shared_ptr<const Execution> execution = nullptr);

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Work> work_;
};

// Aborts the process like a device fault if memory that the work uses is not mapped.
void require_memory(const Work& work);

// Records the ranges of the work as in use until the ticket.
void note_uses(Stream& stream, uint64_t ticket, const Work& work);

// Submits the work to the stream, or to the graph that it captures.
aclError give(const char* call, Stream& stream, Work work);

}  // namespace sim
