// SPDX-License-Identifier: Apache-2.0
//
// The pool's transactions: sleep and wake, each of which happens as a whole or not at all.
#include <algorithm>
#include <functional>
#include <future>
#include <thread>

#include "acl_check.h"
#include "pool.h"

namespace camem {
namespace {

// A short pause between two looks at device memory that another process may give back.
constexpr std::chrono::milliseconds kPoll{1};

void attach_before(std::chrono::steady_clock::time_point deadline, Chunk& chunk, int device) {
  for (;;) {
    try {
      chunk.attach(device);
      return;
    } catch (const OutOfDeviceMemory&) {
      if (std::chrono::steady_clock::now() >= deadline) throw;
      std::this_thread::sleep_for(kPoll);
    }
  }
}

std::string message_of(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  }
}

// Runs the parts at the same time and waits for all. Throws the exception of the first that failed,
// with `current` where it was.
template <typename Position>
void together(const std::vector<std::function<void(Position*)>>& parts, Position* current) {
  std::vector<Position> positions(parts.size(), nullptr);
  std::vector<std::future<void>> others;
  for (std::size_t i = 1; i < parts.size(); ++i) {
    others.push_back(std::async([&, i] { parts[i](&positions[i]); }));
  }
  std::exception_ptr error;
  const auto finish = [&](std::size_t i, const std::function<void()>& wait) {
    try {
      wait();
    } catch (...) {
      if (error) return;
      error = std::current_exception();
      *current = positions[i];
    }
  };
  finish(0, [&] { parts[0](&positions[0]); });
  for (std::size_t i = 1; i < parts.size(); ++i) finish(i, [&] { others[i - 1].get(); });
  if (error) std::rethrow_exception(error);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Waits for everything that was launched on the devices in use. What torch has queued but not yet
// launched is the caller's to flush.
void Pool::synchronize() {
  std::set<int> devices;
  for (auto& [address, allocation] : allocations_) devices.insert(allocation->device);
  for (const int device : devices) {
    DeviceGuard guard(device);
    CAMEM_CHECK(aclrtSynchronizeDevice(), 0);
  }
}

void Pool::preflight_host(const Tasks& offloads) {
  std::size_t needed = 0;
  for (const Task& task : offloads) {
    if (!task.had_backup) needed += task.chunk->bytes;
  }
  needed -= std::min(needed, reserve_.ready_bytes());
  const std::size_t available = available_host_bytes();
  if (needed <= available) return;
  throw OutOfHostMemory("the backup needs " + std::to_string(needed) +
                            " bytes of host memory and " + std::to_string(available) +
                            " are available; free host memory, or use level 2, which keeps no "
                            "backup of the weights",
                        needed, available);
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

// A thread that pins needs no deep queue: the link waits for it anyway.
Parallelism Pool::parallelism(bool pinning) const {
  return pinning ? Parallelism{pin_threads(), 1} : Parallelism{settings_.copy_threads, 16};
}

// Copies the chunks to the host and gives their device memory back, each as soon as its copy is
// verified.
void Pool::offload(const Tasks& tasks, const Task** current) {
  for (auto first = tasks.begin(); first != tasks.end();) {
    const int device = first->allocation->device;
    const auto last = std::find_if(
        first, tasks.end(), [&](const Task& task) { return task.allocation->device != device; });
    std::vector<Chunk*> chunks;
    for (auto task = first; task != last; ++task) chunks.push_back(task->chunk);
    std::size_t unpinned = 0;
    for (auto task = first; task != last; ++task) {
      if (!task->had_backup) unpinned += task->chunk->bytes;
      task->allocation->backup_sum.reset();
    }
    std::size_t failed = 0;
    try {
      HostSpace space(unpinned);
      transfer_.run(
          device, Direction::kDeviceToHost, chunks, parallelism(unpinned > reserve_.ready_bytes()),
          [&](std::size_t i) {
            if (!chunks[i]->backup) chunks[i]->backup = reserve_.take(chunks[i]->bytes, space);
          },
          [&](std::size_t i) {
            chunks[i]->content = Content::kHost;
            chunks[i]->detach();
          },
          &failed);
    } catch (...) {
      *current = &*(first + failed);
      throw;
    }
    first = last;
  }
}

// Maps the chunks and copies back what the host holds; chunks without content come last, since
// nothing has to be copied behind them.
void Pool::restore(const Tasks& tasks, std::chrono::steady_clock::time_point deadline,
                   const Task** current) {
  for (auto first = tasks.begin(); first != tasks.end();) {
    const int device = first->allocation->device;
    const auto last = std::find_if(
        first, tasks.end(), [&](const Task& task) { return task.allocation->device != device; });
    std::vector<Chunk*> chunks;
    std::vector<const Task*> owners;
    for (auto task = first; task != last; ++task) {
      if (task->chunk->content != Content::kHost) continue;
      chunks.push_back(task->chunk);
      owners.push_back(&*task);
    }
    std::size_t failed = 0;
    try {
      transfer_.run(
          device, Direction::kHostToDevice, chunks, parallelism(false),
          [&](std::size_t i) { attach_before(deadline, *chunks[i], device); },
          [&](std::size_t i) { chunks[i]->content = Content::kDevice; }, &failed);
    } catch (...) {
      *current = owners[failed];
      throw;
    }
    DeviceGuard guard(device);
    for (auto task = first; task != last; ++task) {
      if (task->chunk->content == Content::kDevice) continue;
      *current = &*task;
      attach_before(deadline, *task->chunk, device);
      task->chunk->content = Content::kDevice;
    }
    first = last;
  }
}

// Unmaps without giving the memory back, so that it can be undone.
void Pool::unmap(const Tasks& tasks, const Task** current) {
  for (const Task& task : tasks) {
    *current = &task;
    DeviceGuard guard(task.allocation->device);
    task.chunk->memory.unmap();
  }
}

// Gives back memory whose content nobody needs.
void Pool::forget(const Tasks& tasks, const Task** current) {
  for (const Task& task : tasks) {
    *current = &task;
    DeviceGuard guard(task.allocation->device);
    task.chunk->detach();
    task.chunk->content = Content::kNone;
  }
}

Report Pool::sleep(const Plan& plan, const Sums& sums) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  transfer_.reset_copied_bytes();
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

  const Task* current = nullptr;
  try {
    preflight_host(offloads);
    synchronize();
    // What is only unmapped stays ours until nothing can fail any more.
    together<const Task*>({[&](const Task** at) { offload(offloads, at); },
                           [&](const Task** at) { unmap(unmapped, at); },
                           [&](const Task** at) { forget(scratch, at); }},
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
  if (!offloads.empty()) reserve_.clear();  // what nobody took
  report.seconds = seconds_since(start);
  return report;
}

Report Pool::wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  transfer_.reset_copied_bytes();
  const Tasks tasks = select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content != Content::kDevice && tags.count(allocation.tag) != 0;
  });

  const Task* current = nullptr;
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
    const Task* current = nullptr;
    restore(offloads, {}, &current);
  } catch (...) {
    trouble = message_of(std::current_exception());
  }
  remap(scratch, Content::kNone);  // last: what has content needs the memory more
  for (const Task& task : offloads) {
    if (!task.had_backup) task.chunk->settle(false);
  }
  if (trouble.empty()) return "everything is mapped as it was, and the same call can be repeated";
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

void Pool::fail(const char* operation, const Task* at, const std::string& outcome) {
  const std::exception_ptr cause = std::current_exception();
  std::string tag;
  int device = -1;
  std::string message = std::string(operation) + " failed";
  if (at != nullptr) {
    tag = tag_name(at->allocation->tag);
    device = at->allocation->device;
    message += " at tag '" + tag + "' on device " + std::to_string(device);
  }
  message += ": " + message_of(cause) + ". " + outcome + ".";
  throw TransactionError(message, cause, tag, device);
}

}  // namespace camem
