// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

#include "acl_check.h"
#include "acl_optional.h"

namespace camem {
namespace {

thread_local TagId t_current_tag = 0;
std::atomic<bool> g_abandoned{false};
std::atomic<bool> g_ended{false};

// Whether all is done that was launched on a stream of the current context; nothing where it cannot
// be asked.
std::optional<bool> is_idle(aclrtStream stream) {
  aclrtStreamStatus status = ACL_STREAM_STATUS_NOT_READY;
  if (is_capturing(stream) || aclrtStreamQuery(stream, &status) != ACL_SUCCESS) return {};
  return status == ACL_STREAM_STATUS_COMPLETE;
}

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
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

// Before the lock is asked for: in a forked child nobody may be left to give it back.
void Pool::require_alive() {
  if (g_abandoned) {
    throw std::runtime_error(
        "the allocator is shut down in this process: it was forked from the one that uses the "
        "device, or its interpreter has ended; spawn processes that use a device");
  }
}

void Pool::abandon() noexcept {
  g_ended = true;
  if (g_abandoned.exchange(true)) return;  // a forked child cannot join its parent's threads
  reserve_.close();
  // Contexts have to go before the device that torch resets. An operation that is under way, or a
  // copy that has not ended, keeps them.
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (lock.owns_lock() && !transfer_.is_stuck()) transfer_.close();
}

bool Pool::has_ended() const noexcept { return g_ended; }

void Pool::configure(const Settings& settings) {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  if (settings.host_choice != settings_.host_choice) host_choice_.reset();
  settings_ = settings;
  transfer_.set_patience(settings.device_timeout);
}

TagId Pool::tag(const std::string& name) {
  std::lock_guard<std::mutex> lock(tags_mutex_);
  const auto found = std::find(tag_names_.begin(), tag_names_.end(), name);
  if (found == tag_names_.end()) {
    tag_names_.push_back(name);
    return static_cast<TagId>(tag_names_.size() - 1);
  }
  return static_cast<TagId>(found - tag_names_.begin());
}

std::string Pool::tag_name(TagId tag) {
  std::lock_guard<std::mutex> lock(tags_mutex_);
  return tag_names_.at(tag);
}

std::vector<std::string> Pool::tag_names() {
  std::lock_guard<std::mutex> lock(tags_mutex_);
  return tag_names_;
}

TagId Pool::set_current_tag(TagId tag) { return std::exchange(t_current_tag, tag); }

std::size_t Pool::chunk_bytes(TagId tag) const {
  return settings_.scratch_tags.count(tag) != 0
             ? std::max(settings_.chunk_bytes, settings_.scratch_chunk_bytes)
             : settings_.chunk_bytes;
}

void* Pool::allocate(std::size_t bytes, int device) {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  sweep();
  DeviceGuard guard(device);
  std::size_t& unit = granularity_[device];
  if (unit == 0) {
    unit = granularity(device);
    host_source(device);
  }
  auto allocation =
      std::make_unique<Allocation>(device, round_up(std::max<std::size_t>(bytes, 1), unit),
                                   t_current_tag, round_up(chunk_bytes(t_current_tag), unit));
  void* address = allocation->range.base();
  allocations_.emplace(reinterpret_cast<std::uintptr_t>(address), std::move(allocation));
  return address;
}

void Pool::free(void* address, aclrtStream stream) noexcept {
  if (g_abandoned) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = allocations_.find(reinterpret_cast<std::uintptr_t>(address));
  if (found == allocations_.end()) return;
  forget_held(found->second.get());
  doomed_.push_back({std::move(found->second), stream});
  allocations_.erase(found);
  sweep();
  if (allocations_.empty()) {
    prepared_.reset();
    reserve_.clear();
    transfer_.staging().close();
  }
}

// Gives back what is no longer needed, also what an earlier operation could not. A single failing
// call is made good at once; after more, the next operation tries again.
void Pool::sweep(bool synchronized) noexcept {
  bool again = unswept_ || !doomed_.empty();
  for (int attempt = 0; again && attempt < 2; ++attempt, again = unswept_) {
    unswept_ = false;
    for (auto& [allocation, stream] : doomed_) {
      try {
        const ContextGuard guard(default_context(allocation->device));
        if (!is_idle(stream).value_or(synchronized)) continue;
        allocation->release();
        allocation.reset();
      } catch (const std::exception&) {
        unswept_ = true;
      }
    }
    doomed_.erase(std::remove_if(doomed_.begin(), doomed_.end(),
                                 [](const Doomed& doomed) { return !doomed.allocation; }),
                  doomed_.end());
    for (auto& [address, allocation] : allocations_) {
      for (Chunk& chunk : allocation->chunks) {
        if (!chunk.settle(settings_.keep_host_backup || held_)) unswept_ = true;
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

std::size_t Pool::trim(const std::set<std::uintptr_t>& addresses) {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  require_alive();
  require_nothing_stuck();
  synchronize();
  std::size_t bytes = 0;
  for (const std::uintptr_t address : addresses) {
    const auto found = allocations_.find(address);
    if (found == allocations_.end() || found->second->trimmed) continue;
    forget_held(found->second.get());
    found->second->trimmed = true;
    bytes += found->second->range.bytes();
    for (Chunk& chunk : found->second->chunks) chunk.content = Content::kNone;
  }
  unswept_ = true;
  sweep(true);
  return bytes;
}

void Pool::distrust_backups(const std::set<std::uintptr_t>& addresses) {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [address, allocation] : allocations_) {
    if (addresses.count(address) != 0) allocation->backup_distrusted = true;
  }
}

std::vector<AllocationInfo> Pool::allocations() {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<AllocationInfo> infos;
  for (const auto& [address, allocation] : allocations_) {
    AllocationInfo info{address,
                        allocation->range.bytes(),
                        allocation->device,
                        allocation->tag,
                        allocation->state(),
                        0,
                        0,
                        0,
                        allocation->backup_sum};
    for (const Chunk& chunk : allocation->chunks) {
      if (chunk.memory) info.device_bytes += chunk.bytes;
      if (chunk.backup) info.host_bytes += chunk.bytes;
      if (chunk.backup.is_page_locked()) info.page_locked_bytes += chunk.bytes;
    }
    infos.push_back(info);
  }
  return infos;
}

bool Pool::read_backup(std::uintptr_t address, std::size_t bytes, std::byte* target) {
  require_alive();
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = allocations_.upper_bound(address);
  if (found == allocations_.begin()) return false;
  for (const Chunk& chunk : (--found)->second->chunks) {
    const auto start = reinterpret_cast<std::uintptr_t>(chunk.address);
    const auto end = start + chunk.bytes;
    if (bytes == 0 || address >= end) continue;
    if (chunk.content != Content::kHost) return false;
    const std::size_t count = std::min(bytes, end - address);
    std::memcpy(target, chunk.backup.data() + (address - start), count);
    address += count;
    target += count;
    bytes -= count;
  }
  return bytes == 0;
}

}  // namespace camem
