// SPDX-License-Identifier: Apache-2.0
#include "pool/transaction.h"

#include <algorithm>
#include <functional>
#include <future>
#include <utility>
#include <vector>

#include "ascendcl/check.h"
#include "ascendcl/contexts.h"

namespace camem {
namespace {

// Runs the parts concurrently and waits for all. Throws the exception of the first failed part.
void run_parallel(const std::vector<std::function<void()>>& parts) {
  std::vector<std::future<void>> others;
  for (std::size_t i = 1; i < parts.size(); ++i) others.push_back(std::async(parts[i]));
  std::exception_ptr error;
  const auto finish = [&](const auto& work) {
    try {
      work();
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  };
  finish(parts[0]);
  for (auto& other : others) finish([&] { other.get(); });
  if (error) std::rethrow_exception(error);
}

void append(Tasks& tasks, const Tasks& more) {
  tasks.insert(tasks.end(), more.begin(), more.end());
}

// The checksum that `sums` has for an allocation, or null.
const std::uint64_t* sum_of(const Allocation& allocation, const Sums& sums) {
  const auto found = sums.find(reinterpret_cast<std::uintptr_t>(allocation.range.base()));
  return found == sums.end() ? nullptr : &found->second;
}

void require_device_memory(const Tasks& tasks) {
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

}  // namespace

void Transaction::prepare_sleep(const Plan& plan, const Sums& sums, Release release) {
  sums_ = sums;
  place_ = plan.place.value_or(settings_.place);
  const auto select = [&](Action action, const auto& wanted) {
    return registry_.select([&](const Allocation& allocation, const Chunk& chunk) {
      return plan.action(allocation.tag) == action && wanted(allocation, chunk);
    });
  };
  const auto select_mapped = [&](Action action, const auto& wanted) {
    return select(action, [&](const Allocation& allocation, const Chunk& chunk) {
      return chunk.content == Content::kDevice && wanted(allocation);
    });
  };
  const auto is_unchanged = [&](const Allocation& allocation) {
    const std::uint64_t* sum = sum_of(allocation, sums);
    return sum != nullptr && allocation.backed_up(*sum, place_);
  };
  const auto is_scratch = [&](const Allocation& allocation) {
    return release == Release::kAsItComesFree && settings_.scratch_tags.count(allocation.tag) != 0;
  };
  const Tasks copied = select_mapped(Action::kOffload, std::not_fn(is_unchanged));
  const Tasks unchanged = select_mapped(Action::kOffload, is_unchanged);
  const Tasks discarded = select_mapped(Action::kDiscard, std::not_fn(is_scratch));
  const Tasks scratch = select_mapped(Action::kDiscard, is_scratch);
  const Tasks asleep = select(Action::kDiscard, [](const Allocation&, const Chunk& chunk) {
    return chunk.content == Content::kBackup || chunk.content == Content::kParked;
  });
  if (plan.place) {
    to_place_ = select(Action::kOffload, [&](const Allocation&, const Chunk& chunk) {
      return chunk.content == Content::kBackup && chunk.place != place_;
    });
  }
  for (const Tasks& tasks : {copied, unchanged}) append(to_backup_, tasks);
  for (const Tasks& tasks : {discarded, scratch, asleep}) append(to_none_, tasks);

  if (!copied.empty() || !to_place_.empty()) backups_.stop();
  backups_.take_place(place_, copied, to_place_);
  steps_.move(to_place_, place_);
  Tasks parked = discarded;
  append(parked, unchanged);
  const auto half = scratch.begin() + static_cast<std::ptrdiff_t>(scratch.size() / 2);
  run_parallel({[&] { steps_.offload(copied, release); }, [&] { steps_.park(parked); },
                [&] { steps_.discard({scratch.begin(), half}); },
                [&] { steps_.discard({half, scratch.end()}); }});
}

void Transaction::prepare_wake(const std::set<TagId>& tags,
                               std::optional<Steps::Deadline> deadline) {
  to_device_ = registry_.select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content != Content::kDevice && tags.count(allocation.tag) != 0;
  });
  if (!deadline) require_device_memory(to_device_);
  steps_.restore(to_device_, deadline.value_or(Steps::Deadline()));
}

// Each sweep retries to free memory that AscendCL refuses to free now.
Report Transaction::commit() {
  Report report;
  const auto add = [&](const Task& task, std::size_t Moved::* kind) {
    report.tags[task.allocation->tag].*kind += task.chunk->bytes;
  };
  // A copy has taken away the checksum of the backup before.
  for (const Task& task : to_backup_) {
    add(task, task.allocation->backup_sum ? &Moved::unchanged : &Moved::offloaded);
  }
  for (const Task& task : to_none_) add(task, &Moved::discarded);
  for (const Task& task : to_place_) add(task, &Moved::moved);
  for (const Task& task : to_device_) {
    add(task, task.before == Content::kBackup ? &Moved::restored : &Moved::remapped);
  }
  for (const Task& task : to_backup_) {
    task.chunk->content = Content::kBackup;
    const std::uint64_t* sum = sum_of(*task.allocation, sums_);
    if (sum != nullptr) task.allocation->backup_sum = *sum;
  }
  if (place_ == Place::kDisk) {
    for (const Tasks* tasks : {&to_backup_, &to_place_}) {
      for (const Task& task : *tasks) {
        report.tags[task.allocation->tag].written += task.chunk->disk.keep_written();
      }
    }
  }
  for (const Task& task : to_none_) task.chunk->content = Content::kNone;
  for (const Task& task : to_place_) task.chunk->place = place_;
  registry_.needs_sweep();
  return report;
}

RolledBack Transaction::roll_back() noexcept {
  RolledBack result;
  const auto attempt = [&](const auto& work) {
    try {
      work();
    } catch (const std::exception& error) {
      result.trouble = error.what();
    }
  };
  // The chunks that were mapped before and whose content is in this place now.
  const auto for_each_mapped_before = [&](Content content, const auto& work) {
    for (const Tasks* tasks : {&to_backup_, &to_none_}) {
      for (const Task& task : *tasks) {
        if (task.before == Content::kDevice && task.chunk->content == content) work(task);
      }
    }
  };
  const auto remap = [&](const Task& task) {
    attempt([&] {
      const DeviceGuard guard(task.allocation->device);
      task.chunk->remap(task.allocation->device);
    });
  };
  // Parked chunks need no memory, so they go first. Empty ones matter least.
  for_each_mapped_before(Content::kParked, remap);
  attempt([&] {
    Tasks copied;
    for_each_mapped_before(Content::kBackup, [&](const Task& task) { copied.push_back(task); });
    steps_.restore(std::move(copied), {});
  });
  for_each_mapped_before(Content::kNone, [&](const Task& task) {
    result.lost_scratch = true;
    remap(task);
  });
  for_each_mapped_before(Content::kDevice,
                         [&](const Task& task) { backups_.roll_back(task, place_); });
  for (const Task& task : to_place_) backups_.roll_back(task, place_);
  // What is not mapped again: what was written of it may not be on the disk, and no checksum of an
  // earlier backup is that of its content.
  for (const Task& task : to_backup_) {
    if (task.chunk->content == Content::kDevice) continue;
    task.allocation->backup_sum.reset();
    if (place_ == Place::kDisk) task.chunk->disk.forget_written();
  }

  for (const Task& task : to_device_) {
    task.chunk->content = task.before;
    attempt([&] {
      const DeviceGuard guard(task.allocation->device);
      if (task.before != Content::kParked) {
        task.chunk->detach();
      } else if (task.chunk->memory.mapped()) {
        task.chunk->park();
      }
    });
  }
  registry_.needs_sweep();
  return result;
}

Tasks Transaction::stored() const {
  Tasks tasks = to_backup_;
  append(tasks, to_place_);
  return tasks;
}

void Transaction::forget(const Allocation& allocation) {
  for (Tasks* tasks : {&to_backup_, &to_none_, &to_device_, &to_place_}) {
    tasks->erase(std::remove_if(tasks->begin(), tasks->end(),
                                [&](const Task& task) { return task.allocation == &allocation; }),
                 tasks->end());
  }
}

}  // namespace camem
