// SPDX-License-Identifier: Apache-2.0
#include "host_reserve.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <exception>
#include <numeric>
#include <set>
#include <system_error>
#include <utility>

#include "vmm.h"

namespace camem {
namespace {

constexpr std::chrono::milliseconds kMoment{1};
constexpr int kLowestPriority = 19;

// Linux keeps priorities by thread.
void lower_priority() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kLowestPriority);
}

}  // namespace

void HostReserve::prepare(Order order) {
  stop();
  std::lock_guard<std::mutex> lock(mutex_);
  order_ = std::move(order);
  const std::vector<std::size_t>& sizes = order_.sizes;
  stopped_ = false;
  wanted_.assign(sizes.begin(), sizes.end());
  space_ = std::make_unique<HostSpace>(std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}));
  try {
    for (unsigned thread = 0; thread < order_.threads && thread < sizes.size(); ++thread) {
      threads_.emplace_back([this] { work(); });
      ++running_;
    }
  } catch (const std::system_error&) {
    // The machine gives no more threads: what is not taken ahead is taken when it is needed.
    if (threads_.empty()) wanted_.clear();
  }
}

void HostReserve::work() {
  if (order_.in_idle_time) lower_priority();
  std::unique_lock<std::mutex> lock(mutex_);
  try {
    DeviceGuard guard(order_.device);
    changed_.wait_for(lock, order_.delay, [this] { return stopped_; });
    while (!wanted_.empty()) {
      const std::size_t bytes = wanted_.front();
      wanted_.pop_front();
      lock.unlock();
      // Blocks that take the place of others need the host's memory one by one.
      keep_or_use(order_.use ? HostMemory::page_locked(bytes, order_.source)
                             : HostMemory::page_locked(bytes, order_.source, *space_));
      lock.lock();
    }
  } catch (const std::exception&) {
    if (!lock.owns_lock()) lock.lock();
    wanted_.clear();
  }
  --running_;
  changed_.notify_all();
}

void HostReserve::keep_or_use(HostMemory block) {
  if (order_.use) {
    while (!order_.use(block)) {
      std::unique_lock<std::mutex> lock(mutex_);
      if (changed_.wait_for(lock, kMoment, [this] { return stopped_; })) return;
    }
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t bytes = block.bytes();
  ready_.emplace(bytes, std::move(block));
}

std::optional<HostMemory> HostReserve::take(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ready_.find(bytes);
  if (found == ready_.end()) return std::nullopt;
  HostMemory block = std::move(found->second);
  ready_.erase(found);
  return block;
}

void HostReserve::cancel() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!order_.use) return;
    wanted_.clear();
    stopped_ = true;
  }
  changed_.notify_all();
}

void HostReserve::stop() {
  std::vector<std::thread> threads;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_.clear();
    stopped_ = true;
    threads.swap(threads_);
  }
  changed_.notify_all();
  for (std::thread& thread : threads) thread.join();
  if (!threads.empty()) space_.reset();  // else another thread waits for them
}

void HostReserve::give_back() {
  stop();
  std::lock_guard<std::mutex> lock(mutex_);
  if (ready_.empty()) return;
  const auto release = [device = order_.device](std::multimap<std::size_t, HostMemory> blocks) {
    try {
      DeviceGuard guard(device);
      blocks.clear();
    } catch (const std::exception&) {
      // They are given back without the device being current.
    }
  };
  try {
    givers_.emplace_back(release, std::exchange(ready_, {}));
  } catch (const std::system_error&) {
    // The machine gives no more threads: they were given back on this one.
  }
}

void HostReserve::wait_until_given_back() {
  std::vector<std::thread> givers;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    givers.swap(givers_);
  }
  for (std::thread& giver : givers) giver.join();
}

bool HostReserve::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return running_ == 0; });
}

void HostReserve::clear() noexcept {
  stop();
  wait_until_given_back();
  std::lock_guard<std::mutex> lock(mutex_);
  ready_.clear();
}

std::size_t HostReserve::ready_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [size, block] : ready_) bytes += size;
  return bytes;
}

std::size_t HostReserve::ready_bytes(const std::vector<std::size_t>& sizes) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::multiset<std::size_t> ready;
  for (const auto& [size, block] : ready_) ready.insert(size);
  std::size_t bytes = 0;
  for (const std::size_t size : sizes) {
    const auto found = ready.find(size);
    if (found == ready.end()) continue;
    ready.erase(found);
    bytes += size;
  }
  return bytes;
}

}  // namespace camem
