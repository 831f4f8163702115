// SPDX-License-Identifier: Apache-2.0
//
// Page-locked blocks that threads in the background take ahead of their use.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "host_memory.h"

namespace camem {

// Thread-safe.
class HostReserve {
 public:
  // What becomes of a block, once it is there. Returns false to be called again after a moment.
  using Use = std::function<bool(HostMemory& block)>;

  struct Order {
    int device;
    std::vector<std::size_t> sizes;
    HostSource source;
    unsigned threads;
    bool in_idle_time;              // the threads take processor time that nobody else wants
    std::chrono::seconds delay{0};  // before the first
    Use use;                        // empty: the blocks are kept until somebody takes them
  };

  // Starts to take blocks of these sizes and returns. A block that cannot be had ends the work: who
  // needs it meets the reason.
  void prepare(Order order);

  // A block of exactly this size that is ready, or none.
  std::optional<HostMemory> take(std::size_t bytes);

  // Ends an order whose blocks are used at once, without waiting for those that are begun.
  void cancel();
  // Ends what is prepared, and gives back what is ready, in the background.
  void give_back();
  void wait_until_given_back();

  void stop();                // ends the taking of blocks; what is ready stays
  bool wait(double seconds);  // until all that was asked for is ready; false: not in that time
  void clear() noexcept;      // stops and gives everything back
  std::size_t ready_bytes();  // of all blocks that are ready
  // Bytes of those blocks that are ready, of blocks of these sizes.
  std::size_t ready_bytes(const std::vector<std::size_t>& sizes);

 private:
  void work();
  void keep_or_use(HostMemory block);

  std::mutex mutex_;
  std::condition_variable changed_;
  Order order_;
  std::deque<std::size_t> wanted_;
  bool stopped_ = false;
  std::unique_ptr<HostSpace> space_;  // of those that are wanted and will be kept
  std::multimap<std::size_t, HostMemory> ready_;
  std::size_t running_ = 0;
  std::vector<std::thread> threads_;
  std::vector<std::thread> givers_;
};

}  // namespace camem
