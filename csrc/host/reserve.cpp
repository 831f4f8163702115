// SPDX-License-Identifier: Apache-2.0
#include "host/reserve.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <set>
#include <thread>
#include <utility>

#include "ascendcl/contexts.h"

namespace camem {
namespace {

constexpr std::chrono::milliseconds kMoment{1};
constexpr std::chrono::milliseconds kBetweenSteps{100};
constexpr std::chrono::milliseconds kLook{10};
constexpr int kServingRest = 50;

std::size_t sum(const std::vector<std::size_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
}

}  // namespace

HostReserve::Work::Work(Order ordered)
    : order(std::move(ordered)),
      wanted(order.sizes.begin(), order.sizes.end()),
      space(sum(order.sizes)) {}

// The thread is counted until its function has returned.
void HostReserve::start(std::function<void()> function) {
  std::thread([this, function = std::move(function)] {
    function();
    std::lock_guard<std::mutex> lock(mutex_);
    --threads_;
    changed_.notify_all();
  }).detach();
  ++threads_;
}

void HostReserve::prepare(Order order) {
  std::lock_guard<std::mutex> lock(mutex_);
  stop_locked();
  if (closed_ || order.sizes.empty()) return;
  device_ = order.device;
  work_ = std::make_shared<Work>(std::move(order));
  const std::size_t threads = std::min<std::size_t>(work_->order.threads, work_->wanted.size());
  try {
    while (work_->running < threads) {
      start([this, work = work_] { carry_out(work); });
      ++work_->running;
    }
  } catch (const std::exception&) {
    // No more threads are available: the blocks are allocated when they are needed.
    if (work_->running == 0) work_->wanted.clear();
  }
}

void HostReserve::carry_out(const std::shared_ptr<Work>& work) noexcept {
  const HostReserve::Order& order = work->order;
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  const auto stopped = [&] { return work->stopped; };
  try {
    DeviceGuard guard(order.device);
    lock.lock();
    changed_.wait_for(lock, order.delay, stopped);
    for (;;) {
      wait_for_turn(lock, *work);
      if (work->wanted.empty()) break;
      const std::size_t bytes = work->wanted.front();
      work->wanted.pop_front();
      ++work->taking;
      lock.unlock();
      const auto start = std::chrono::steady_clock::now();
      // Blocks that replace others need host memory one at a time.
      HostMemory block = order.use ? HostMemory::page_locked(bytes, order.source)
                                   : HostMemory::page_locked(bytes, order.source, work->space);
      const auto end = std::chrono::steady_clock::now();
      keep_or_use(*work, std::move(block));
      lock.lock();
      --work->taking;
      work->rests_until = end + kServingRest * (end - start);
      if (order.slowly) changed_.wait_for(lock, end - start, stopped);
    }
  } catch (const std::exception&) {
    if (!lock.owns_lock()) lock.lock();
    work->wanted.clear();
  }
  --work->running;
  changed_.notify_all();
}

void HostReserve::step_begins() noexcept {
  ++told_;
  ++steps_;
}

void HostReserve::step_ends() noexcept {
  last_step_ = std::chrono::steady_clock::now();
  --steps_;
}

// The engine also counts as serving in the short time between two steps.
bool HostReserve::is_serving() const {
  return steps_ > 0 || std::chrono::steady_clock::now() - last_step_.load() < kBetweenSteps;
}

// While the engine serves, only one thread of an order works at a time.
void HostReserve::wait_for_turn(std::unique_lock<std::mutex>& lock, const Work& work) {
  while (!work.wanted.empty() && is_serving() &&
         (work.taking > 0 || std::chrono::steady_clock::now() < work.rests_until)) {
    changed_.wait_for(lock, kLook, [&] { return work.stopped; });
  }
}

void HostReserve::keep_or_use(Work& work, HostMemory block) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!work.order.use) {
    if (!work.stopped) ready_.emplace(block.bytes(), std::move(block));
    return;
  }
  while (!work.stopped) {
    lock.unlock();
    if (work.order.use(block)) return;
    lock.lock();
    changed_.wait_for(lock, kMoment, [&] { return work.stopped; });
  }
}

void HostReserve::keep(HostMemory block) {
  std::lock_guard<std::mutex> lock(mutex_);
  ready_.emplace(block.bytes(), std::move(block));
}

bool HostReserve::is_working() {
  std::lock_guard<std::mutex> lock(mutex_);
  return work_ && work_->running > 0;
}

std::optional<HostMemory> HostReserve::take(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ready_.find(bytes);
  if (found == ready_.end()) return std::nullopt;
  HostMemory block = std::move(found->second);
  ready_.erase(found);
  return block;
}

void HostReserve::stop_locked() {
  if (!work_) return;
  work_->wanted.clear();
  work_->stopped = true;
  work_.reset();
  changed_.notify_all();
}

void HostReserve::stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stop_locked();
}

void HostReserve::cancel() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (work_ && work_->order.use) stop_locked();
}

bool HostReserve::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return !work_ || work_->running == 0; });
}

void HostReserve::give_back() {
  std::lock_guard<std::mutex> lock(mutex_);
  stop_locked();
  if (ready_.empty() || closed_) return;
  const auto blocks = std::make_shared<std::multimap<std::size_t, HostMemory>>();
  blocks->swap(ready_);
  try {
    start([this, device = device_, blocks] {
      // AscendCL needs a context to free memory, and this thread has none yet.
      std::optional<DeviceGuard> guard;
      for (int attempt = 0; attempt < 2 && !guard; ++attempt) {
        try {
          guard.emplace(device);
        } catch (const std::exception&) {
        }
      }
      blocks->clear();
    });
  } catch (const std::exception&) {
    // No more threads are available: free the blocks on this one.
  }
}

void HostReserve::wait_until_idle() {
  std::unique_lock<std::mutex> lock(mutex_);
  const std::size_t working = work_ ? work_->running : 0;
  changed_.wait(lock, [&] { return threads_ <= working; });
}

void HostReserve::clear() noexcept {
  give_back();
  wait_until_idle();
}

void HostReserve::close() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  stop_locked();
  changed_.wait(lock, [this] { return threads_ == 0; });
}

std::size_t HostReserve::ready_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [size, block] : ready_) bytes += size;
  return bytes;
}

std::vector<std::size_t> HostReserve::not_ready(const std::vector<std::size_t>& sizes) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::multiset<std::size_t> ready;
  for (const auto& [size, block] : ready_) ready.insert(size);
  std::vector<std::size_t> others;
  for (const std::size_t size : sizes) {
    const auto found = ready.find(size);
    if (found == ready.end()) {
      others.push_back(size);
    } else {
      ready.erase(found);
    }
  }
  return others;
}

}  // namespace camem
