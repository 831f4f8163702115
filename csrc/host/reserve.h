// SPDX-License-Identifier: Apache-2.0
//
// Page-locked blocks that threads in the background take ahead of their use.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "host/memory.h"

namespace camem {

// Thread-safe, and lives as long as the process. Calls do not wait for a block that is being taken,
// since the machine may be busy and AscendCL slow; those that do say so.
class HostReserve {
 public:
  // What becomes of a block once it is there. Returns false to be called again after a moment.
  using Use = std::function<bool(HostMemory& block)>;

  struct Order {
    int device = 0;
    std::vector<std::size_t> sizes;
    HostSource source = HostSource::kAcl;
    unsigned threads = 1;
    bool slowly = false;            // a thread rests after each block for as long as it took
    std::chrono::seconds delay{0};  // before the first
    Use use;                        // empty: the blocks are kept until somebody takes them
  };

  // Ends the order before, starts to take blocks of these sizes, and returns. A block that cannot
  // be had ends the order.
  void prepare(Order order);
  bool is_working();

  void keep(HostMemory block);  // until somebody takes it

  // A block of exactly this size that is ready, or none.
  std::optional<HostMemory> take(std::size_t bytes);

  // A step of the model begins or has ended. While one runs, and for a moment after, blocks are
  // taken one by one, with fifty times as long a rest after each as it took: the driver may keep
  // launches waiting meanwhile.
  void step_begins() noexcept;
  void step_ends() noexcept;
  std::uint64_t steps() const { return told_; }  // so far

  void stop();                // ends the order; what is ready stays
  void cancel();              // the same, of an order whose blocks are used at once
  bool wait(double seconds);  // until the order is carried out; false: not in that time

  // Ends the order, and gives back in the background what is ready.
  void give_back();
  // Waits until nothing is given back any more, and orders that were ended have dropped the blocks
  // that they were taking.
  void wait_until_idle();
  void clear() noexcept;  // give_back() and wait_until_idle()
  void close() noexcept;  // ends everything for good, and waits for all threads

  std::size_t ready_bytes();  // of all blocks that are ready
  // Those of the sizes for which no block is ready.
  std::vector<std::size_t> not_ready(const std::vector<std::size_t>& sizes);

 private:
  // An order and how far it is. Its threads keep it alive.
  struct Work {
    explicit Work(Order ordered);

    const Order order;
    std::deque<std::size_t> wanted;
    bool stopped = false;
    std::size_t running = 0;
    std::size_t taking = 0;                               // threads that take a block
    std::chrono::steady_clock::time_point rests_until{};  // while steps run
    HostSpace space;                                      // of blocks that are kept
  };

  void carry_out(const std::shared_ptr<Work>& work) noexcept;
  void wait_for_turn(std::unique_lock<std::mutex>& lock, const Work& work);
  bool is_serving() const;
  void keep_or_use(Work& work, HostMemory block);
  void stop_locked();
  void start(std::function<void()> function);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<Work> work_;
  int device_ = 0;  // of the last order
  std::multimap<std::size_t, HostMemory> ready_;
  std::size_t threads_ = 0;  // of all orders, and those that give back
  std::atomic<std::uint64_t> told_{0};
  std::atomic<int> steps_{0};  // that run
  std::atomic<std::chrono::steady_clock::time_point> last_step_{};
  bool closed_ = false;
};

}  // namespace camem
