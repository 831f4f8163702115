// SPDX-License-Identifier: Apache-2.0
//
// The host memory of the pool's backups: where it comes from, and what is taken ahead of its use.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <numeric>
#include <thread>
#include <utility>

#include "pool.h"

namespace camem {
namespace {

// Fewer chunks are locked sooner than it takes to find out what is faster.
constexpr std::size_t kWorthMeasuring = 16;

// Sleeps and wakes follow each other closely at times, and the driver's locks are theirs then.
constexpr std::chrono::seconds kQuiet{1};

}  // namespace

unsigned Pool::host_threads() const {
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  return std::max(settings_.copy_threads, std::min(settings_.host_threads, cores));
}

HostSource Pool::host_source(int device) {
  if (!host_choice_) host_choice_ = choose_host_source(settings_.host_source, device);
  return host_choice_->source;
}

// Whether backups of so many bytes, for which nothing is ready, are better copied into plain
// memory.
bool Pool::stages(int device, std::size_t bytes) {
  if (bytes == 0 || settings_.unprepared == Unprepared::kLock) return false;
  if (settings_.unprepared == Unprepared::kStage) return true;
  if (!host_speeds_) {
    if (bytes < kWorthMeasuring * settings_.chunk_bytes) return false;
    host_speeds_ =
        transfer_.staging().open_and_measure(device, host_threads(), host_source(device));
  }
  return host_speeds_->copying > host_speeds_->locking;
}

// Host memory that a sleep of these has yet to take.
std::size_t Pool::missing_host_bytes(Tasks::const_iterator first, Tasks::const_iterator last) {
  std::vector<std::size_t> sizes;
  std::for_each(first, last, [&](const Task& task) {
    if (!task.chunk->backup) sizes.push_back(task.chunk->bytes);
  });
  return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}) - reserve_.ready_bytes(sizes);
}

void Pool::preflight_host(const Tasks& offloads) {
  const std::size_t needed = missing_host_bytes(offloads.begin(), offloads.end());
  if (needed <= available_host_bytes()) return;
  reserve_.wait_until_given_back();
  const std::size_t available = available_host_bytes();
  if (needed > available) throw_backup_does_not_fit(needed, available);
}

void Pool::prepare(const std::set<TagId>& tags, bool in_idle_time) {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  reserve_.clear();
  const Tasks tasks = select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content == Content::kDevice && !chunk.backup && tags.count(allocation.tag) != 0;
  });
  if (tasks.empty()) return;
  preflight_host(tasks);
  HostReserve::Order order{};
  order.device = tasks.front().allocation->device;
  for (const Task& task : tasks) order.sizes.push_back(task.chunk->bytes);
  DeviceGuard guard(order.device);
  order.source = host_source(order.device);
  order.threads = in_idle_time ? 1 : host_threads();
  order.in_idle_time = in_idle_time;
  reserve_.prepare(std::move(order));
}

void Pool::release_prepared() {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  reserve_.give_back();
}

// After a transaction. A sleep took what it needed of what was prepared.
void Pool::finish_with_host_memory(bool was_sleep) noexcept {
  if (was_sleep) reserve_.give_back();
  try {
    lock_plain_backups();
  } catch (const std::exception&) {
    // They stay plain: the next copy goes through the staging again.
  }
}

// Takes page-locked memory for plain backups in the background, so that the next copy runs at the
// speed of the link. Not for backups that go with the wake: to give it back takes longer.
void Pool::lock_plain_backups() {
  HostReserve::Order order{};
  for (auto& [address, allocation] : allocations_) {
    for (const Chunk& chunk : allocation->chunks) {
      if (!chunk.backup || chunk.backup.is_page_locked()) continue;
      order.device = allocation->device;
      order.sizes.push_back(chunk.bytes);
    }
  }
  if (order.sizes.empty()) {
    transfer_.staging().close();
    return;
  }
  if (!settings_.keep_host_backup) return;
  order.source = host_choice_->source;
  order.threads = 1;
  order.in_idle_time = true;
  order.delay = kQuiet;
  order.use = [this](HostMemory& block) { return put_in_place_of_plain(block); };
  reserve_.prepare(std::move(order));
}

// False: the pool is busy. A transaction that stops the reserve holds the lock meanwhile.
bool Pool::put_in_place_of_plain(HostMemory& block) {
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  for (auto& [address, allocation] : allocations_) {
    for (Chunk& chunk : allocation->chunks) {
      HostMemory& backup = chunk.backup;
      if (!backup || backup.is_page_locked() || backup.bytes() != block.bytes()) continue;
      std::memcpy(block.data(), backup.data(), block.bytes());
      std::swap(backup, block);
      return true;
    }
  }
  return true;
}

HostInfo Pool::host_info() {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  return {host_choice_, host_speeds_, reserve_.ready_bytes(), transfer_.staging().bytes()};
}

}  // namespace camem
