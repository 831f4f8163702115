// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "acl_check.h"

namespace camem {
namespace {

thread_local TagId t_current_tag = 0;
std::atomic<bool> g_abandoned{false};

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

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

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Pool& Pool::instance() {
  static Pool* pool = new Pool();
  return *pool;
}

Pool::Pool() : tag_names_{"default"} {
  // A forked child has neither the device nor the threads of its parent.
  pthread_atfork(nullptr, nullptr, [] { g_abandoned = true; });
}

void Pool::abandon() noexcept { g_abandoned = true; }

void Pool::configure(const Settings& settings) {
  std::lock_guard<std::mutex> lock(mutex_);
  settings_ = settings;
}

TagId Pool::tag(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find(tag_names_.begin(), tag_names_.end(), name);
  if (found == tag_names_.end()) {
    tag_names_.push_back(name);
    return static_cast<TagId>(tag_names_.size() - 1);
  }
  return static_cast<TagId>(found - tag_names_.begin());
}

std::string Pool::tag_name(TagId tag) {
  std::lock_guard<std::mutex> lock(mutex_);
  return tag_names_.at(tag);
}

std::vector<std::string> Pool::tag_names() {
  std::lock_guard<std::mutex> lock(mutex_);
  return tag_names_;
}

TagId Pool::set_current_tag(TagId tag) { return std::exchange(t_current_tag, tag); }

void* Pool::allocate(std::size_t bytes, int device) {
  if (g_abandoned) throw std::runtime_error("the allocator is shut down in this process");
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  DeviceGuard guard(device);
  std::size_t& unit = granularity_[device];
  if (unit == 0) unit = granularity(device);
  auto allocation =
      std::make_unique<Allocation>(device, round_up(std::max<std::size_t>(bytes, 1), unit),
                                   t_current_tag, round_up(settings_.chunk_bytes, unit));
  void* address = allocation->range.base();
  allocations_.emplace(reinterpret_cast<std::uintptr_t>(address), std::move(allocation));
  return address;
}

void Pool::free(void* address) noexcept {
  if (g_abandoned) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = allocations_.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == allocations_.end()) return;
  doomed_.push_back(std::move(found->second));
  allocations_.erase(found);
  unswept_ = true;
  sweep();
}

// Gives back what is no longer needed, also what an earlier operation could not. A single failing
// call is made good at once; after more, the next operation tries again.
void Pool::sweep() noexcept {
  for (int attempt = 0; unswept_ && attempt < 2; ++attempt) {
    unswept_ = false;
    for (auto& allocation : doomed_) {
      try {
        DeviceGuard guard(allocation->device);
        CAMEM_CHECK(aclrtSynchronizeDevice(), 0);
        allocation->release();
        allocation.reset();
      } catch (const std::exception&) {
        unswept_ = true;
      }
    }
    doomed_.erase(std::remove(doomed_.begin(), doomed_.end(), nullptr), doomed_.end());
    for (auto& [address, allocation] : allocations_) {
      for (Chunk& chunk : allocation->chunks) {
        if (!chunk.settle(settings_.keep_host_backup)) unswept_ = true;
      }
    }
  }
}

Pool::Tasks Pool::select(const std::function<bool(const Allocation&, const Chunk&)>& wanted) {
  Tasks tasks;
  for (auto& [address, allocation] : allocations_) {
    if (allocation->trimmed) continue;
    for (Chunk& chunk : allocation->chunks) {
      if (wanted(*allocation, chunk)) {
        tasks.push_back({allocation.get(), &chunk, chunk.content, bool(chunk.backup)});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return a.allocation->device < b.allocation->device;
  });
  return tasks;
}

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

unsigned Pool::copy_threads(bool pinning) const {
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  return pinning ? std::max(settings_.copy_threads, std::min(settings_.pin_threads, cores))
                 : settings_.copy_threads;
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
    const bool pinning =
        std::any_of(first, last, [](const Task& task) { return !task.had_backup; });
    std::size_t failed = 0;
    try {
      transfer_.run(
          device, Direction::kDeviceToHost, chunks, copy_threads(pinning),
          [&](std::size_t i) {
            if (!chunks[i]->backup) chunks[i]->backup = HostMemory(chunks[i]->bytes);
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
          device, Direction::kHostToDevice, chunks, copy_threads(false),
          [&](std::size_t i) { attach_before(deadline, *chunks[i], device); },
          [&](std::size_t i) { chunks[i]->content = Content::kDevice; }, &failed);
    } catch (...) {
      *current = owners[failed];
      throw;
    }
    DeviceGuard guard(device);
    for (auto task = first; task != last; ++task) {
      if (task->chunk->content != Content::kNone) continue;
      *current = &*task;
      attach_before(deadline, *task->chunk, device);
      task->chunk->content = Content::kDevice;
    }
    first = last;
  }
}

Report Pool::sleep(const Plan& plan) {
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  const auto select_mapped = [&](Action action) {
    return select([&](const Allocation& allocation, const Chunk& chunk) {
      return chunk.content == Content::kDevice && plan.action(allocation.tag) == action;
    });
  };
  const Tasks offloads = select_mapped(Action::kOffload);
  const Tasks discards = select_mapped(Action::kDiscard);
  const Tasks forgets = select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content == Content::kHost && plan.action(allocation.tag) == Action::kDiscard;
  });

  const Task* current = nullptr;
  try {
    preflight_host(offloads);
    synchronize();
    offload(offloads, &current);
    for (const Task& task : discards) {
      current = &task;
      DeviceGuard guard(task.allocation->device);
      task.chunk->memory.unmap();  // the memory stays ours until nothing can fail any more
    }
  } catch (...) {
    fail("sleep", current, undo_sleep(offloads, discards));
  }

  Report report;
  for (const Task& task : offloads) {
    report.tags[task.allocation->tag].offloaded += task.chunk->bytes;
  }
  for (const Tasks& tasks : {discards, forgets}) {
    for (const Task& task : tasks) {
      task.chunk->content = Content::kNone;
      report.tags[task.allocation->tag].discarded += task.chunk->bytes;
    }
  }
  unswept_ = true;
  sweep();
  report.seconds = seconds_since(start);
  return report;
}

Report Pool::wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout) {
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
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
std::string Pool::undo_sleep(const Tasks& offloads, const Tasks& discards) noexcept {
  std::string trouble;
  for (const Task& task : discards) {
    try {
      DeviceGuard guard(task.allocation->device);
      task.chunk->attach(task.allocation->device);
    } catch (...) {
      task.chunk->content = Content::kNone;
      trouble = message_of(std::current_exception());
    }
  }
  try {
    const Task* current = nullptr;
    restore(offloads, {}, &current);
  } catch (...) {
    trouble = message_of(std::current_exception());
  }
  for (const Task& task : offloads) {
    if (!task.had_backup) task.chunk->settle(false);
  }
  if (trouble.empty()) return "everything is mapped as it was, and the same call can be repeated";
  unswept_ = true;
  return "taking it back failed too (" + trouble +
         "); nothing is lost: what is not mapped is in host memory and comes back with wake_up";
}

// Gives back what a failed wake mapped; the host backups were never touched.
std::string Pool::undo_wake(const Tasks& tasks) noexcept {
  std::string trouble;
  for (const Task& task : tasks) {
    task.chunk->content = task.before;
    try {
      DeviceGuard guard(task.allocation->device);
      task.chunk->detach();
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
    tag = tag_names_.at(at->allocation->tag);
    device = at->allocation->device;
    message += " at tag '" + tag + "' on device " + std::to_string(device);
  }
  message += ": " + message_of(cause) + ". " + outcome + ".";
  throw TransactionError(message, cause, tag, device);
}

std::size_t Pool::trim(const std::set<std::uintptr_t>& addresses) {
  std::lock_guard<std::mutex> lock(mutex_);
  synchronize();
  std::size_t bytes = 0;
  for (const std::uintptr_t address : addresses) {
    const auto found = allocations_.find(address);
    if (found == allocations_.end() || found->second->trimmed) continue;
    found->second->trimmed = true;
    bytes += found->second->range.bytes();
    for (Chunk& chunk : found->second->chunks) chunk.content = Content::kNone;
  }
  unswept_ = true;
  sweep();
  return bytes;
}

std::vector<AllocationInfo> Pool::allocations() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<AllocationInfo> infos;
  for (const auto& [address, allocation] : allocations_) {
    AllocationInfo info{address,         allocation->range.bytes(), allocation->device,
                        allocation->tag, allocation->state(),       0,
                        0};
    for (const Chunk& chunk : allocation->chunks) {
      if (chunk.memory) info.device_bytes += chunk.bytes;
      if (chunk.backup) info.host_bytes += chunk.bytes;
    }
    infos.push_back(info);
  }
  return infos;
}

}  // namespace camem
