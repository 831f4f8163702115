// SPDX-License-Identifier: Apache-2.0
//
// What streams do: copies, fills and kernels, given to the device at once or kept by the graph that
// the stream captures, which gives them to the device again and again.
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
  bool on_device;  // else page-locked memory of the host
};

struct Work {
  std::vector<Range> ranges;  // in use until the work is done

  // The stream's own thread runs it. What it answers, if not 0, is an error of the context.
  std::function<int()> run;
  // Instead, outside graphs: gives it to the device and answers with a ticket. Null: there is no
  // way.
  std::function<uint64_t(Stream&)> submit;
  std::function<void()> launched;  // null: nothing to do when it is given to a stream
  std::function<void()> skip;      // null: nothing to do where its turn is passed over
  bool is_kernel = false;          // of the device's own cores: what a task group takes

  std::string name;  // of the call that gave it, for messages
};

// One execution of a graph.
struct Execution {
  std::shared_ptr<Graph> graph;
  std::shared_ptr<Stream> stream;
  std::atomic<bool> is_refused{false};  // by the device, which executes the graph elsewhere
};

// Work that is given to streams, by a graph many times. What runs is looked up when its turn comes,
// so that an update reaches what waits.
class Task : public std::enable_shared_from_this<Task> {
 public:
  explicit Task(Work work) : work_(std::make_shared<const Work>(std::move(work))) {}

  std::shared_ptr<const Work> work() const;
  void replace(std::shared_ptr<const Work> work);

  // Without noting its ranges. The context's error, if it fails, is that of its graph; without one,
  // what it answers.
  uint64_t submit(Stream& stream, std::shared_ptr<const Execution> execution = nullptr);

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Work> work_;
};

// Ends the process, as a fault of the device does, if memory that the work uses is not there.
void require_memory(const Work& work);

// Notes the ranges of the work as in use until the ticket.
void note_uses(Stream& stream, uint64_t ticket, const Work& work);

// Gives the work to the stream, or to the graph that it captures.
aclError give(const char* call, Stream& stream, Work work);

}  // namespace sim
