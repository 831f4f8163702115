// SPDX-License-Identifier: Apache-2.0
//
// Page-locked blocks that background threads allocate in advance.
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

// Thread-safe, and lives as long as the process. Unless a comment says so, calls do not wait for a
// block that is being allocated, because AscendCL may be slow.
class HostReserve {
 public:
  // What to do with a new block. Returns false to be called again a moment later.
  using Use = std::function<bool(HostMemory& block)>;

  struct Order {
    int device = 0;
    std::vector<std::size_t> sizes;
    HostSource source = HostSource::kAcl;
    unsigned threads = 1;
    bool slowly = false;            // pause after each block for as long as it took
    std::chrono::seconds delay{0};  // before the first block
    Use use;                        // if empty, blocks are kept until take()
  };

  // Replaces the previous order, starts to allocate the blocks, and returns. The order ends at the
  // first block that cannot be allocated.
  void prepare(Order order);
  bool is_working();

  void keep(HostMemory block);  // until take()

  // A ready block of exactly this size, or none.
  std::optional<HostMemory> take(std::size_t bytes);

  // A step of the model begins or has ended. While one runs, and for a moment after it, blocks are
  // allocated one at a time, each followed by a pause fifty times as long as it took, because the
  // driver may delay launches meanwhile.
  void step_begins() noexcept;
  void step_ends() noexcept;
  std::uint64_t steps() const { return told_; }  // so far

  void stop();                // ends the order; what is ready stays
  void cancel();              // the same, if the order has a `use`
  bool wait(double seconds);  // until the order is done; false on a timeout

  // Ends the order, and frees the ready blocks in the background.
  void give_back();
  // Waits until all of that is freed, including blocks that ended orders were still allocating.
  void wait_until_idle();
  void clear() noexcept;  // give_back() and wait_until_idle()
  void close() noexcept;  // final: ends everything and waits for all threads

  std::size_t ready_bytes();  // of all ready blocks
  // The sizes for which no block is ready.
  std::vector<std::size_t> not_ready(const std::vector<std::size_t>& sizes);

 private:
  // An order and its progress. Its threads keep it alive.
  struct Work {
    explicit Work(Order ordered);

    const Order order;
    std::deque<std::size_t> wanted;
    bool stopped = false;
    std::size_t running = 0;
    std::size_t taking = 0;                               // threads that are allocating a block
    std::chrono::steady_clock::time_point rests_until{};  // while steps run
    HostSpace space;                                      // for blocks that are kept
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
  std::size_t threads_ = 0;  // of all orders, and those that free blocks
  std::atomic<std::uint64_t> told_{0};
  std::atomic<int> steps_{0};  // running now
  std::atomic<std::chrono::steady_clock::time_point> last_step_{};
  bool closed_ = false;
};

}  // namespace camem
