// SPDX-License-Identifier: Apache-2.0
//
// Sleep and wake in two steps, for ranks that must all do the same: what can fail is done and held,
// then carried out or taken back. Held, a sleep has copied and unmapped but gives no device memory
// back, so taking it back needs neither memory nor copies; a wake has mapped and copied, and its
// backups stay.
#include <algorithm>

#include "acl_check.h"
#include "pool.h"

namespace camem {

void Pool::hold_sleep(const Plan& plan, const Sums& sums) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  begin("sleep", true);
  unpark();
  const auto unchanged = [&](const Allocation& allocation) {
    const auto sum = sums.find(reinterpret_cast<std::uintptr_t>(allocation.range.base()));
    return sum != sums.end() && allocation.backed_up(sum->second);
  };
  const auto select_for = [&](Action action, bool backed_up, bool asleep = false) {
    return select([&](const Allocation& allocation, const Chunk& chunk) {
      if (plan.action(allocation.tag) != action) return false;
      if (asleep) return chunk.content == Content::kHost || chunk.content == Content::kParked;
      if (chunk.content != Content::kDevice) return false;
      return action == Action::kDiscard || unchanged(allocation) == backed_up;
    });
  };
  const Tasks offloads = select_for(Action::kOffload, false);
  const Tasks kept = select_for(Action::kOffload, true);
  const Tasks discards = select_for(Action::kDiscard, false);
  const Tasks forgets = select_for(Action::kDiscard, false, true);
  if (!offloads.empty()) reserve_.stop();

  held_.emplace();
  held_->start = start;
  held_->sums = sums;
  for (const Tasks& tasks : {offloads, kept}) {
    held_->to_host.insert(held_->to_host.end(), tasks.begin(), tasks.end());
  }
  for (const Tasks& tasks : {discards, forgets}) {
    held_->to_none.insert(held_->to_none.end(), tasks.begin(), tasks.end());
  }
  const auto count = [&](const Tasks& tasks, std::size_t Moved::* kind) {
    for (const Task& task : tasks) {
      held_->report.tags[task.allocation->tag].*kind += task.chunk->bytes;
    }
  };
  count(offloads, &Moved::offloaded);
  count(kept, &Moved::unchanged);
  count(held_->to_none, &Moved::discarded);

  const Allocation* current = nullptr;
  try {
    preflight_host(offloads);
    offload(offloads, &current, true);
    for (const Tasks& tasks : {kept, discards}) {
      for (const Task& task : tasks) {
        current = task.allocation;
        DeviceGuard guard(task.allocation->device);
        task.chunk->memory.unmap();
        task.chunk->content = Content::kParked;
      }
    }
    current = nullptr;
  } catch (...) {
    fail("sleep", current, outcome_of_taking_back());
  }
}

void Pool::hold_wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout) {
  require_alive();
  const auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  begin("wake", !doomed_.empty());
  held_.emplace();
  held_->start = start;
  held_->woken = select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content != Content::kDevice && tags.count(allocation.tag) != 0;
  });
  for (const Task& task : held_->woken) {
    Moved& moved = held_->report.tags[task.allocation->tag];
    (task.before == Content::kHost ? moved.restored : moved.remapped) += task.chunk->bytes;
  }
  const Allocation* current = nullptr;
  try {
    if (timeout.count() <= 0) preflight_device(held_->woken);
    const auto wait = std::chrono::duration_cast<std::chrono::steady_clock::duration>(timeout);
    restore(held_->woken, start + wait, &current);
  } catch (...) {
    fail("wake", current, outcome_of_taking_back());
  }
}

// Nothing here can fail: memory that AscendCL does not take back now is offered again later.
Report Pool::commit() {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  if (!held_) throw std::logic_error("nothing is held: there is nothing to commit");
  Held held = std::move(*held_);
  held_.reset();
  for (const Task& task : held.to_host) {
    task.chunk->content = Content::kHost;
    const auto sum =
        held.sums.find(reinterpret_cast<std::uintptr_t>(task.allocation->range.base()));
    if (sum != held.sums.end()) task.allocation->backup_sum = sum->second;
  }
  for (const Task& task : held.to_none) task.chunk->content = Content::kNone;
  unswept_ = true;
  sweep();
  go_on_in_background(held.to_host);
  held.report.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - held.start).count();
  return held.report;
}

std::string Pool::abort() {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  std::string trouble = take_back();
  go_on_in_background();
  return trouble;
}

// Returns what failed, empty: nothing. Memory that cannot be mapped again is kept, with its
// content.
std::string Pool::take_back() noexcept {
  if (!held_) return "";
  const Held held = std::move(*held_);
  held_.reset();
  std::string trouble;
  const auto attempt = [&](const Task& task, auto&& step) {
    try {
      DeviceGuard guard(task.allocation->device);
      step();
    } catch (const std::exception& error) {
      trouble = error.what();
    }
  };
  for (const Tasks& tasks : {held.to_host, held.to_none}) {
    for (const Task& task : tasks) {
      if (task.before != Content::kDevice) continue;
      attempt(task, [&] {
        task.chunk->attach(task.allocation->device);
        task.chunk->content = Content::kDevice;
      });
      if (!task.had_backup) return_backup(*task.allocation, *task.chunk);
    }
  }
  for (const Task& task : held.woken) {
    task.chunk->content = task.before;
    attempt(task, [&] {
      if (task.before != Content::kParked) {
        task.chunk->detach();
      } else if (task.chunk->memory.mapped()) {
        task.chunk->memory.unmap();
      }
    });
  }
  unswept_ = true;
  return trouble;
}

std::string Pool::outcome_of_taking_back() noexcept {
  const std::string trouble = take_back();
  if (trouble.empty()) return "everything is as it was, and the same call can be repeated";
  return "taking it back failed too (" + trouble + "); nothing is lost, and wake_up brings it back";
}

// Torch frees memory of an allocation that is part of what is held.
void Pool::forget_held(const Allocation* allocation) {
  if (!held_) return;
  for (Tasks* tasks : {&held_->to_host, &held_->to_none, &held_->woken}) {
    tasks->erase(std::remove_if(tasks->begin(), tasks->end(),
                                [&](const Task& task) { return task.allocation == allocation; }),
                 tasks->end());
  }
}

}  // namespace camem
