// SPDX-License-Identifier: Apache-2.0
#include "pool/steps.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "ascendcl/check.h"
#include "ascendcl/contexts.h"

namespace camem {
namespace {

// The interval between attempts to get device memory that another process may free.
constexpr std::chrono::milliseconds kPoll{1};

// Wraps exceptions of `work` in a StepFailure for that allocation.
template <class Work>
void at(const Allocation& allocation, const Work& work) {
  try {
    work();
  } catch (const StepFailure&) {
    throw;
  } catch (...) {
    throw StepFailure(allocation, std::current_exception());
  }
}

// Runs `work` with the allocation's device current on this thread.
template <class Work>
void on_device(const Task& task, const Work& work) {
  at(*task.allocation, [&] {
    const DeviceGuard guard(task.allocation->device);
    work(*task.chunk);
  });
}

// The end of the tasks on the same device as the first.
template <class Iterator>
Iterator end_of_device(Iterator first, Iterator last) {
  const int device = first->allocation->device;
  return std::find_if(first, last,
                      [&](const Task& task) { return task.allocation->device != device; });
}

// Does the work for each task on several threads. At the first exception no further task is begun,
// and it is thrown once all threads have ended.
template <class Iterator, class Work>
void on_threads(unsigned threads, Iterator first, Iterator last, const Work& work) {
  const auto count = static_cast<std::size_t>(last - first);
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto run = [&] {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        work(first[static_cast<std::ptrdiff_t>(i)]);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next = count;
      }
    }
  };
  std::vector<std::thread> others;
  try {
    for (std::size_t i = 1; i < std::min<std::size_t>(threads, count); ++i) {
      others.emplace_back(run);
    }
  } catch (const std::system_error&) {
    // No more threads are available: continue with those that were started.
  }
  run();
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

template <class Iterator>
bool any_plain(Iterator first, Iterator last) {
  return std::any_of(first, last, [](const Task& task) {
    const Chunk& chunk = *task.chunk;
    return !chunk.on_disk() && chunk.backup && !chunk.backup.is_page_locked();
  });
}

}  // namespace

std::string message_of(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  }
}

// Many copies in flight keep the link busy while other processes use the device. A thread that also
// allocates host memory, or copies within it, is slower than the link, so one copy is enough. So is
// a thread that waits for the disk, which wants as many requests as there are threads.
Parallelism Steps::open_staging(Iterator first, Iterator last, bool takes_host_memory,
                                bool stages) {
  const int device = first->allocation->device;
  const bool plain = any_plain(first, last);
  const auto on_disk = static_cast<unsigned>(
      std::min(std::count_if(first, last, [](const Task& task) { return task.chunk->on_disk(); }),
               std::ptrdiff_t{1} << 16));
  if (stages || plain) {
    transfer_.staging().open(device, backups_.threads(), backups_.source(device));
  }
  unsigned threads = takes_host_memory || plain ? backups_.threads() : 0;
  if (on_disk > 0) {
    const unsigned wanted = std::min(backups_.disk_threads(), on_disk);
    transfer_.disk_staging().open_as_needed(wanted, backups_.source(device));
    threads = std::max(threads, wanted);
  }
  return threads > 0 ? Parallelism{threads, 1} : Parallelism{settings_.copy_threads, 8};
}

void Steps::copy(Iterator first, Iterator last, Direction direction, Parallelism parallelism,
                 const Transfer::Step& before, const Transfer::Step& after) {
  std::vector<Chunk*> chunks;
  for (auto task = first; task != last; ++task) chunks.push_back(task->chunk);
  try {
    transfer_.run(first->allocation->device, direction, chunks, parallelism, before, after);
  } catch (const CopyFailure& failure) {
    at(*first[static_cast<std::ptrdiff_t>(failure.index)].allocation,
       [&] { std::rethrow_exception(failure.cause); });
  }
}

void Steps::offload(const Tasks& tasks, Release release) {
  for (auto first = tasks.begin(); first != tasks.end();) {
    const auto last = end_of_device(first, tasks.end());
    const int device = first->allocation->device;
    for (auto task = first; task != last; ++task) {
      task->allocation->backup_sum.reset();
      task->allocation->backup_distrusted = false;
    }
    at(*first->allocation, [&] {
      const std::size_t missing = first->chunk->on_disk() ? 0 : backups_.missing(first, last);
      HostSpace space(missing);
      const HostSource source = backups_.source(device);
      const bool stage = backups_.stages(device, missing);
      const Parallelism parallelism = open_staging(first, last, missing > 0, stage);
      const auto before = [&](std::size_t i) {
        Chunk& chunk = *first[static_cast<std::ptrdiff_t>(i)].chunk;
        if (chunk.has_backup()) return;
        if (auto ready = backups_.take(chunk.bytes)) {
          chunk.backup = std::move(*ready);
        } else {
          chunk.backup = stage ? HostMemory::plain(chunk.bytes, space)
                               : HostMemory::any(chunk.bytes, source, space);
        }
      };
      const auto after = [&](std::size_t i) {
        Chunk& chunk = *first[static_cast<std::ptrdiff_t>(i)].chunk;
        if (release == Release::kAtCommit || chunk.on_disk()) return chunk.park();
        chunk.content = Content::kBackup;
        chunk.detach();
      };
      copy(first, last, Direction::kDeviceToHost, parallelism, before, after);
    });
    first = last;
  }
  if (!tasks.empty() && tasks.front().chunk->on_disk()) sync(tasks);
}

void Steps::sync(const Tasks& tasks) {
  std::map<DiskFile*, const Allocation*> files;
  for (const Task& task : tasks) files.emplace(task.chunk->disk.file().get(), task.allocation);
  for (const auto& [file, allocation] : files) at(*allocation, [file = file] { file->sync(); });
}

// The disk writes from and reads into the backups in host memory themselves.
void Steps::move(const Tasks& tasks, Place place) {
  for (auto first = tasks.begin(); first != tasks.end();) {
    const auto last = end_of_device(first, tasks.end());
    const int device = first->allocation->device;
    const bool to_disk = place == Place::kDisk;
    const std::size_t missing = to_disk ? 0 : backups_.missing(first, last);
    HostSpace space(missing);
    HostSource source = HostSource::kAcl;
    bool plain = false;
    if (!to_disk) {
      at(*first->allocation, [&] {
        source = backups_.source(device);
        plain = backups_.stages(device, missing);
      });
    }
    const auto allocate = [&](Chunk& chunk) {
      auto ready = backups_.take(chunk.bytes);
      chunk.backup = ready   ? std::move(*ready)
                     : plain ? HostMemory::plain(chunk.bytes, space)
                             : HostMemory::any(chunk.bytes, source, space);
    };
    on_threads(backups_.disk_threads(), first, last, [&](const Task& task) {
      on_device(task, [&](Chunk& chunk) {
        if (!to_disk && !chunk.backup) allocate(chunk);
        for (std::size_t i = 0; i < chunk.disk.pieces(); ++i) {
          std::byte* piece = chunk.backup.data() + i * DiskBackup::kPiece;
          if (to_disk) {
            chunk.disk.write_piece(i, piece);
          } else {
            chunk.disk.read_piece(i, piece);
          }
          transfer_.add_copied_bytes(chunk.disk.bytes_of(i));
        }
      });
    });
    if (to_disk) sync({first, last});
    first = last;
  }
}

// Maps chunks on a separate thread, ahead of the copies into them: other processes may free device
// memory slowly, and the link should not wait for each chunk.
class Steps::MapAhead {
 public:
  MapAhead(Tasks tasks, Deadline deadline) : tasks_(std::move(tasks)), deadline_(deadline) {
    try {
      thread_ = std::thread([this] { run(); });
    } catch (const std::system_error&) {
      run();  // no more threads are available
    }
  }

  ~MapAhead() {
    stopped_ = true;
    if (thread_.joinable()) thread_.join();
  }

  // Returns when the i-th is mapped. Throws what prevented that for it or an earlier one.
  void wait(std::size_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return mapped_ > i || error_; });
    if (mapped_ <= i) std::rethrow_exception(error_);
  }

 private:
  void run() noexcept {
    for (const Task& task : tasks_) {
      std::exception_ptr error;
      try {
        on_device(task, [&](Chunk& chunk) { attach(chunk, task.allocation->device); });
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

  void attach(Chunk& chunk, int device) {
    for (;;) {
      try {
        chunk.attach(device);
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

// Chunks without content are mapped last, because no copy waits for them.
void Steps::restore(Tasks tasks, Deadline deadline) {
  const auto with_content = [](const Task& task) {
    return task.chunk->content == Content::kBackup;
  };
  for (auto first = tasks.begin(); first != tasks.end();) {
    const auto last = end_of_device(first, tasks.end());
    const auto empty = std::stable_partition(first, last, with_content);
    at(*first->allocation, [&] {
      MapAhead ahead({first, last}, deadline);
      const auto mapped = [&](std::size_t i) { ahead.wait(i); };
      const auto copied = [&](std::size_t i) {
        first[static_cast<std::ptrdiff_t>(i)].chunk->content = Content::kDevice;
      };
      if (first != empty) {
        copy(first, empty, Direction::kHostToDevice, open_staging(first, empty, false, false),
             mapped, copied);
      }
      for (auto task = empty; task != last; ++task) {
        mapped(static_cast<std::size_t>(task - first));
        task->chunk->content = Content::kDevice;
      }
    });
    first = last;
  }
}

void Steps::park(const Tasks& tasks) {
  for (const Task& task : tasks) on_device(task, [](Chunk& chunk) { chunk.park(); });
}

void Steps::discard(const Tasks& tasks) {
  for (const Task& task : tasks) {
    on_device(task, [](Chunk& chunk) {
      chunk.detach();
      chunk.content = Content::kNone;
    });
  }
}

}  // namespace camem
