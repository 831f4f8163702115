// SPDX-License-Identifier: Apache-2.0
//
// The pool's transactions: sleep and wake, each of which happens as a whole or not at all.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <future>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <utility>

#include "acl_check.h"
#include "pool.h"

namespace camem {
namespace {

// A short pause between two looks at device memory that another process may give back.
constexpr std::chrono::milliseconds kPoll{1};

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

// Host memory that a sleep of these has yet to pin.
std::size_t Pool::unpinned_bytes(Tasks::const_iterator first, Tasks::const_iterator last) {
  std::vector<std::size_t> sizes;
  std::for_each(first, last, [&](const Task& task) {
    if (!task.chunk->backup) sizes.push_back(task.chunk->bytes);
  });
  return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}) - reserve_.ready_bytes(sizes);
}

void Pool::preflight_host(const Tasks& offloads) {
  const std::size_t needed = unpinned_bytes(offloads.begin(), offloads.end());
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

// Many copies in flight keep the link busy while other processes use the device too; a thread that
// pins is slower than the link anyway.
Parallelism Pool::parallelism(bool pinning) const {
  return pinning ? Parallelism{pin_threads(), 1} : Parallelism{settings_.copy_threads, 8};
}

// Copies the chunks to the host and gives their device memory back, each as soon as its copy is
// verified; to be held, it is unmapped and stays ours.
void Pool::offload(const Tasks& tasks, const Allocation** current, bool hold) {
  for (auto first = tasks.begin(); first != tasks.end();) {
    const int device = first->allocation->device;
    const auto last = std::find_if(
        first, tasks.end(), [&](const Task& task) { return task.allocation->device != device; });
    std::vector<Chunk*> chunks;
    for (auto task = first; task != last; ++task) {
      chunks.push_back(task->chunk);
      task->allocation->backup_sum.reset();
    }
    std::size_t failed = 0;
    try {
      const std::size_t unpinned = unpinned_bytes(first, last);
      HostSpace space(unpinned);
      transfer_.run(
          device, Direction::kDeviceToHost, chunks, parallelism(unpinned > 0),
          [&](std::size_t i) {
            if (!chunks[i]->backup) chunks[i]->backup = reserve_.take(chunks[i]->bytes, space);
          },
          [&](std::size_t i) {
            if (hold) chunks[i]->memory.unmap();
            chunks[i]->content = hold ? Content::kParked : Content::kHost;
            if (!hold) chunks[i]->detach();
          },
          &failed);
    } catch (...) {
      *current = (first + failed)->allocation;
      throw;
    }
    first = last;
  }
}

// Maps chunks on a thread of its own, ahead of the copies into them: device memory that others give
// back may come slowly, and the link must not wait for each chunk of it.
class Pool::MapAhead {
 public:
  MapAhead(Tasks tasks, Deadline deadline) : tasks_(std::move(tasks)), deadline_(deadline) {
    try {
      thread_ = std::thread([this] { run(); });
    } catch (const std::system_error&) {
      run();  // the machine gives no more threads
    }
  }

  ~MapAhead() {
    stopped_ = true;
    if (thread_.joinable()) thread_.join();
  }

  // Returns when the i-th is mapped. Throws what kept it or one before it from being so.
  void wait(std::size_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return mapped_ > i || error_; });
    if (mapped_ <= i) std::rethrow_exception(error_);
  }

  // The one that could not be mapped, or null.
  const Allocation* failed() {
    std::lock_guard<std::mutex> lock(mutex_);
    return error_ ? tasks_[mapped_].allocation : nullptr;
  }

 private:
  void run() noexcept {
    for (const Task& task : tasks_) {
      std::exception_ptr error;
      try {
        attach(task);
      } catch (...) {
        error = std::current_exception();
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (error) {
        error_ = error;
      } else {
        ++mapped_;
      }
      changed_.notify_all();
      if (error || stopped_) return;
    }
  }

  void attach(const Task& task) {
    DeviceGuard guard(task.allocation->device);
    for (;;) {
      try {
        task.chunk->attach(task.allocation->device);
        return;
      } catch (const OutOfDeviceMemory&) {
        if (stopped_ || std::chrono::steady_clock::now() >= deadline_) throw;
        std::this_thread::sleep_for(kPoll);
      }
    }
  }

  const Tasks tasks_;
  const Deadline deadline_;
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t mapped_ = 0;
  std::exception_ptr error_;
  std::thread thread_;
};

// Maps the chunks and copies back what the host holds. Chunks without content are mapped last: no
// copy waits for them.
void Pool::restore(Tasks tasks, Deadline deadline, const Allocation** current) {
  const auto with_content = [](const Task& task) { return task.chunk->content == Content::kHost; };
  for (auto first = tasks.begin(); first != tasks.end();) {
    const int device = first->allocation->device;
    const auto last = std::find_if(
        first, tasks.end(), [&](const Task& task) { return task.allocation->device != device; });
    const auto empty = std::stable_partition(first, last, with_content);
    std::vector<Chunk*> chunks;
    for (auto task = first; task != empty; ++task) chunks.push_back(task->chunk);
    MapAhead ahead({first, last}, deadline);
    std::size_t failed = 0;
    try {
      transfer_.run(
          device, Direction::kHostToDevice, chunks, parallelism(false),
          [&](std::size_t i) { ahead.wait(i); },
          [&](std::size_t i) { chunks[i]->content = Content::kDevice; }, &failed);
      for (auto task = empty; task != last; ++task) {
        failed = static_cast<std::size_t>(task - first);
        ahead.wait(failed);
        task->chunk->content = Content::kDevice;
      }
    } catch (...) {
      *current = ahead.failed() != nullptr ? ahead.failed() : (first + failed)->allocation;
      throw;
    }
    first = last;
  }
}

// Unmaps without giving the memory back, so that it can be undone.
void Pool::unmap(const Tasks& tasks, const Allocation** current) {
  for (const Task& task : tasks) {
    *current = task.allocation;
    DeviceGuard guard(task.allocation->device);
    task.chunk->memory.unmap();
  }
}

// Gives back memory whose content nobody needs.
void Pool::forget(const Tasks& tasks, const Allocation** current) {
  for (const Task& task : tasks) {
    *current = task.allocation;
    DeviceGuard guard(task.allocation->device);
    task.chunk->detach();
    task.chunk->content = Content::kNone;
  }
}

// Maps again what a failed sleep had to leave unmapped, if that is possible by now.
void Pool::unpark() noexcept {
  for (auto& [address, allocation] : allocations_) {
    for (Chunk& chunk : allocation->chunks) {
      if (chunk.content != Content::kParked) continue;
      try {
        DeviceGuard guard(allocation->device);
        chunk.attach(allocation->device);
        chunk.content = Content::kDevice;
      } catch (const std::exception&) {
        continue;
      }
    }
  }
}

Report Pool::sleep(const Plan& plan, const Sums& sums) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  take_back();
  sweep();
  unpark();
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

  const Allocation* current = nullptr;
  try {
    preflight_host(offloads);
    synchronize();
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
  if (!offloads.empty()) reserve_.clear();  // what nobody took
  report.seconds = seconds_since(start);
  return report;
}

Report Pool::wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  take_back();
  sweep();
  transfer_.reset_copied_bytes();
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
    if (!task.had_backup) task.chunk->settle(false);
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
