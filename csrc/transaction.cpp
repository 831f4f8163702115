// SPDX-License-Identifier: Apache-2.0
//
// The pool's transactions: sleep and wake, each of which happens as a whole or not at all.
#include <algorithm>
#include <functional>
#include <future>
#include <mutex>
#include <numeric>
#include <utility>

#include "acl_check.h"
#include "acl_newer.h"
#include "pool.h"

namespace camem {
namespace {

std::string message_of(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  }
}

// A part of a transaction: says in `current` which allocation it is at.
using Part = std::function<void(const Allocation** current)>;

// Runs the parts at the same time and waits for all. Throws the exception of the first that failed,
// with `current` where it was.
void together(const std::vector<Part>& parts, const Allocation** current) {
  std::vector<const Allocation*> at(parts.size(), nullptr);
  std::vector<std::future<void>> others;
  for (std::size_t i = 1; i < parts.size(); ++i) {
    others.push_back(std::async([&, i] { parts[i](&at[i]); }));
  }
  std::exception_ptr error;
  const auto finish = [&](std::size_t i, const std::function<void()>& work) {
    try {
      work();
    } catch (...) {
      if (error) return;
      error = std::current_exception();
      *current = at[i];
    }
  };
  finish(0, [&] { parts[0](&at[0]); });
  for (std::size_t i = 1; i < parts.size(); ++i) finish(i, [&] { others[i - 1].get(); });
  if (error) std::rethrow_exception(error);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void wait_for(const std::set<aclrtContext>& contexts, std::chrono::milliseconds limit) {
  for (const aclrtContext context : contexts) {
    const ContextGuard guard(context);
    const auto timeout_ms = static_cast<std::int32_t>(limit.count());
    const aclError code = aclrtSynchronizeDeviceWithTimeout(timeout_ms);
    if (code == kStreamSyncTimeout) {
      throw AclError("aclrtSynchronizeDeviceWithTimeout", code, 0,
                     "what was launched on the device before has not ended after " +
                         std::to_string(timeout_ms) + " ms (device_timeout_s)");
    }
    if (code == kStreamCaptured) {
      throw AclError("aclrtSynchronizeDeviceWithTimeout", code, 0,
                     "a stream captures a graph: come again when the capture has ended");
    }
    check(code, "aclrtSynchronizeDeviceWithTimeout", 0, __FILE__, __LINE__);
  }
}

}  // namespace

// Torch's contexts of the devices in use, and that of this thread.
std::set<aclrtContext> Pool::contexts_in_use() {
  std::set<aclrtContext> contexts;
  for (auto& [address, allocation] : allocations_) {
    contexts.insert(default_context(allocation->device));
  }
  for (auto& doomed : doomed_) contexts.insert(default_context(doomed.allocation->device));
  const aclrtContext own = current_context();
  if (own != nullptr && !contexts.empty()) contexts.insert(own);
  return contexts;
}

// Waits for everything that was launched on the devices in use. What torch has queued but not yet
// launched is the caller's to flush.
void Pool::synchronize() { wait_for(contexts_in_use(), settings_.device_timeout); }

void Pool::wait_for_devices() {
  require_alive();
  std::set<aclrtContext> contexts;
  std::chrono::milliseconds limit;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    require_alive();
    contexts = contexts_in_use();
    if (const aclrtContext own = current_context(); own != nullptr) contexts.insert(own);
    limit = settings_.device_timeout;
  }
  wait_for(contexts, limit);  // without the lock: torch may allocate and free meanwhile
}

// A copy that has not ended in time may still use memory that an operation would unmap or free.
void Pool::require_nothing_stuck() {
  if (!transfer_.is_stuck()) return;
  throw std::runtime_error(
      "a copy of an earlier operation has not ended yet; if it never does, end the process");
}

// What every transaction begins with.
void Pool::begin(const char* operation, bool waits) {
  require_alive();  // it may have ended while this thread waited for the lock
  reserve_.cancel();
  try {
    require_nothing_stuck();
    if (waits || held_) synchronize();  // work may run on memory that taking back would unmap
    take_back();
  } catch (...) {
    fail(operation, nullptr, "nothing was touched, and the same call can be repeated");
  }
  sweep(waits);
  transfer_.reset_copied_bytes();
}

// Takes back what a failed sleep took for a backup: it is kept if it was prepared.
void Pool::return_backup(const Allocation& allocation, Chunk& chunk) noexcept {
  if (chunk.content != Content::kDevice || chunk.is_stuck()) return;
  if (prepared_ && prepared_->tags.count(allocation.tag) != 0 && chunk.backup.is_page_locked()) {
    reserve_.keep(std::move(chunk.backup));
  } else if (!chunk.settle(false)) {
    unswept_ = true;
  }
}

void Pool::preflight_device(const Tasks& tasks) {
  std::map<int, std::size_t> needed;
  for (const Task& task : tasks) {
    if (!task.chunk->memory) needed[task.allocation->device] += task.chunk->bytes;
  }
  for (const auto& [device, bytes] : needed) {
    DeviceGuard guard(device);
    const std::size_t free = free_device_bytes();
    if (bytes <= free) continue;
    throw OutOfDeviceMemory("device " + std::to_string(device) + " has " + std::to_string(free) +
                                " bytes free and " + std::to_string(bytes) +
                                " are needed; free device memory (another process may hold it), "
                                "wake fewer tags, or set wake_timeout_s to wait for it",
                            bytes, free);
  }
}

Report Pool::sleep(const Plan& plan, const Sums& sums) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  begin("sleep", true);
  unpark();
  const auto select_mapped = [&](Action action, bool apart = false) {
    return select([&](const Allocation& allocation, const Chunk& chunk) {
      if (chunk.content != Content::kDevice || plan.action(allocation.tag) != action) return false;
      if (action == Action::kDiscard)
        return apart == (settings_.scratch_tags.count(allocation.tag) != 0);
      const auto sum = sums.find(reinterpret_cast<std::uintptr_t>(allocation.range.base()));
      return apart == (sum != sums.end() && allocation.backed_up(sum->second));
    });
  };
  const Tasks offloads = select_mapped(Action::kOffload);
  const Tasks unchanged = select_mapped(Action::kOffload, true);
  const Tasks discards = select_mapped(Action::kDiscard);
  const Tasks scratch = select_mapped(Action::kDiscard, true);
  if (!offloads.empty()) reserve_.stop();
  Tasks unmapped = discards;
  unmapped.insert(unmapped.end(), unchanged.begin(), unchanged.end());
  const Tasks forgets = select([&](const Allocation& allocation, const Chunk& chunk) {
    return (chunk.content == Content::kHost || chunk.content == Content::kParked) &&
           plan.action(allocation.tag) == Action::kDiscard;
  });

  const Allocation* current = nullptr;
  try {
    preflight_host(offloads);
    // What is only unmapped stays ours until nothing can fail any more.
    const auto half = scratch.begin() + static_cast<std::ptrdiff_t>(scratch.size() / 2);
    together({[&](const Allocation** at) { offload(offloads, at); },
              [&](const Allocation** at) { unmap(unmapped, at); },
              [&](const Allocation** at) { forget({scratch.begin(), half}, at); },
              [&](const Allocation** at) { forget({half, scratch.end()}, at); }},
             &current);
  } catch (...) {
    fail("sleep", current, undo_sleep(offloads, unchanged, discards, scratch));
  }

  Report report;
  for (const Task& task : offloads) {
    report.tags[task.allocation->tag].offloaded += task.chunk->bytes;
    const auto sum = sums.find(reinterpret_cast<std::uintptr_t>(task.allocation->range.base()));
    if (sum != sums.end()) task.allocation->backup_sum = sum->second;
  }
  for (const Task& task : unchanged) {
    task.chunk->content = Content::kHost;
    report.tags[task.allocation->tag].unchanged += task.chunk->bytes;
  }
  for (const Tasks& tasks : {discards, forgets, scratch}) {
    for (const Task& task : tasks) {
      task.chunk->content = Content::kNone;
      report.tags[task.allocation->tag].discarded += task.chunk->bytes;
    }
  }
  unswept_ = true;
  sweep();
  go_on_in_background(offloads);
  report.seconds = seconds_since(start);
  return report;
}

Report Pool::wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  begin("wake", !doomed_.empty());
  const Tasks tasks = select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content != Content::kDevice && tags.count(allocation.tag) != 0;
  });

  const Allocation* current = nullptr;
  try {
    if (timeout.count() <= 0) preflight_device(tasks);
    const auto wait = std::chrono::duration_cast<std::chrono::steady_clock::duration>(timeout);
    restore(tasks, start + wait, &current);
  } catch (...) {
    fail("wake", current, undo_wake(tasks));
  }

  Report report;
  for (const Task& task : tasks) {
    Moved& moved = report.tags[task.allocation->tag];
    (task.before == Content::kHost ? moved.restored : moved.remapped) += task.chunk->bytes;
  }
  unswept_ = true;
  sweep();
  go_on_in_background();
  report.seconds = seconds_since(start);
  return report;
}

// Brings every chunk of a failed sleep back onto the device. Returns what is to be said of it.
std::string Pool::undo_sleep(const Tasks& offloads, const Tasks& unchanged, const Tasks& discards,
                             const Tasks& scratch) noexcept {
  std::string trouble;
  const auto remap = [&](const Tasks& tasks, Content otherwise) {
    for (const Task& task : tasks) {
      try {
        DeviceGuard guard(task.allocation->device);
        task.chunk->attach(task.allocation->device);
        task.chunk->content = Content::kDevice;
      } catch (...) {
        task.chunk->content = otherwise;
        trouble = message_of(std::current_exception());
      }
    }
  };
  remap(unchanged, Content::kHost);
  remap(discards, Content::kParked);
  try {
    const Allocation* current = nullptr;
    restore(offloads, {}, &current);
  } catch (...) {
    trouble = message_of(std::current_exception());
  }
  remap(scratch, Content::kNone);  // last: what has content needs the memory more
  for (const Task& task : offloads) {
    if (!task.had_backup) return_backup(*task.allocation, *task.chunk);
  }
  if (trouble.empty()) {
    return std::string("everything is mapped as it was") +
           (scratch.empty() ? "" : " (KV cache and workspace without content)") +
           ", and the same call can be repeated";
  }
  unswept_ = true;
  return "taking it back failed too (" + trouble +
         "); nothing is lost: what is not mapped is kept and comes back with wake_up";
}

// Gives back what a failed wake mapped; the host backups were never touched.
std::string Pool::undo_wake(const Tasks& tasks) noexcept {
  std::string trouble;
  for (const Task& task : tasks) {
    task.chunk->content = task.before;
    try {
      DeviceGuard guard(task.allocation->device);
      if (task.before == Content::kParked) {
        if (task.chunk->memory.mapped()) task.chunk->memory.unmap();
      } else {
        task.chunk->detach();
      }
    } catch (...) {
      trouble = message_of(std::current_exception());
    }
  }
  unswept_ = true;
  if (trouble.empty()) return "everything sleeps as it did, and the same call can be repeated";
  return "giving the memory back failed too (" + trouble +
         "); nothing is lost, and the same call can be repeated";
}

void Pool::fail(const char* operation, const Allocation* at, const std::string& outcome) {
  const std::exception_ptr cause = std::current_exception();
  go_on_in_background();
  std::string tag;
  int device = -1;
  std::string message = std::string(operation) + " failed";
  if (at != nullptr) {
    tag = tag_name(at->tag);
    device = at->device;
    message += " at tag '" + tag + "' on device " + std::to_string(device);
  }
  message += ": " + message_of(cause) + ". " + outcome + ".";
  throw TransactionError(message, cause, tag, device);
}

}  // namespace camem
