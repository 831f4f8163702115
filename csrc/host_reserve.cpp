// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <exception>
#include <numeric>
#include <set>
#include <system_error>
#include <utility>

#include "host_pool.h"
#include "vmm.h"

namespace camem {

void HostReserve::prepare(int device, const std::vector<std::size_t>& sizes, unsigned threads) {
  stop();
  std::lock_guard<std::mutex> lock(mutex_);
  space_ = std::make_unique<HostSpace>(std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}));
  wanted_.assign(sizes.begin(), sizes.end());
  try {
    for (unsigned thread = 0; thread < threads && thread < sizes.size(); ++thread) {
      threads_.emplace_back([this, device] { work(device); });
      ++running_;
    }
  } catch (const std::system_error&) {
    // The machine gives no more threads: what is not pinned ahead is pinned when it is needed.
    if (threads_.empty()) wanted_.clear();
  }
}

void HostReserve::work(int device) {
  std::unique_lock<std::mutex> lock(mutex_);
  try {
    DeviceGuard guard(device);
    while (!wanted_.empty()) {
      const std::size_t bytes = wanted_.front();
      wanted_.pop_front();
      lock.unlock();
      HostMemory block(bytes, *space_);
      lock.lock();
      ready_.emplace(bytes, std::move(block));
    }
  } catch (const std::exception&) {
    if (!lock.owns_lock()) lock.lock();
    wanted_.clear();
  }
  --running_;
  changed_.notify_all();
}

HostMemory HostReserve::take(std::size_t bytes, HostSpace& space) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = ready_.find(bytes);
    if (found != ready_.end()) {
      HostMemory block = std::move(found->second);
      ready_.erase(found);
      return block;
    }
  }
  return HostMemory(bytes, space);
}

void HostReserve::stop() {
  std::vector<std::thread> threads;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_.clear();
    threads.swap(threads_);
  }
  for (std::thread& thread : threads) thread.join();
  if (!threads.empty()) space_.reset();  // else another thread waits for them
}

bool HostReserve::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return running_ == 0; });
}

void HostReserve::clear() noexcept {
  stop();
  std::lock_guard<std::mutex> lock(mutex_);
  ready_.clear();
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
