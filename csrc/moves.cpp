// SPDX-License-Identifier: Apache-2.0
//
// What transactions do to chunks: copy to the host and back, map, unmap, forget.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "acl_check.h"
#include "pool.h"

namespace camem {
namespace {

// A short pause between two looks at device memory that another process may give back.
constexpr std::chrono::milliseconds kPoll{1};

bool any_plain(const std::vector<Chunk*>& chunks) {
  return std::any_of(chunks.begin(), chunks.end(), [](const Chunk* chunk) {
    return chunk->backup && !chunk->backup.is_page_locked();
  });
}

}  // namespace

// Many copies in flight keep the link busy while other processes use the device too; a thread that
// takes host memory, or copies in it, is slower than the link anyway.
Parallelism Pool::parallelism(bool takes_host_memory) const {
  return takes_host_memory ? Parallelism{host_threads(), 1}
                           : Parallelism{settings_.copy_threads, 8};
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
      task->allocation->backup_distrusted = false;
    }
    std::size_t failed = 0;
    try {
      const std::size_t missing = missing_host_bytes(first, last);
      HostSpace space(missing);
      const HostSource source = host_source(device);
      const bool stage = stages(device, missing);
      if (stage || any_plain(chunks)) transfer_.staging().open(device, host_threads(), source);
      transfer_.run(
          device, Direction::kDeviceToHost, chunks, parallelism(missing > 0 || any_plain(chunks)),
          [&](std::size_t i) {
            HostMemory& backup = chunks[i]->backup;
            if (backup) return;
            if (auto ready = reserve_.take(chunks[i]->bytes)) {
              backup = std::move(*ready);
            } else {
              backup = stage ? HostMemory::plain(chunks[i]->bytes, space)
                             : HostMemory::any(chunks[i]->bytes, source, space);
            }
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
      if (any_plain(chunks)) transfer_.staging().open(device, host_threads(), host_source(device));
      transfer_.run(
          device, Direction::kHostToDevice, chunks, parallelism(any_plain(chunks)),
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

}  // namespace camem
