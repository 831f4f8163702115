// SPDX-License-Identifier: Apache-2.0
//
// Pinned host memory for backups: exact sizes, huge pages advised, never rounded up.
//
// Whoever touches a page first decides its NUMA node, and the threads that do inherit the affinity
// of the thread that sleeps: where the worker is bound to the node of its device, the backup lies
// there too.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace camem {

// Addresses for blocks that several threads pin at once, mapped in one go: a thread that maps has
// to wait for all that touch their pages meanwhile, and they for it. Holds no memory itself.
class HostSpace {
 public:
  explicit HostSpace(std::size_t bytes);  // throws OutOfHostMemory
  ~HostSpace();                           // unmaps what nobody took
  HostSpace(const HostSpace&) = delete;
  HostSpace& operator=(const HostSpace&) = delete;

  // The next `bytes`, which are the caller's to unmap. Thread-safe. Throws OutOfHostMemory when the
  // machine could not give all that is left of the space any more, std::logic_error when nothing is
  // left.
  std::byte* take(std::size_t bytes);

 private:
  std::mutex mutex_;
  std::byte* next_ = nullptr;
  std::byte* end_ = nullptr;
};

// One pinned block. The constructor touches and registers it on the calling thread, so that several
// threads make several blocks at once; where registering is not available, or a limit on registered
// memory is reached, the block comes from aclrtMallocHost. Throws OutOfHostMemory or AclError.
class HostMemory {
 public:
  HostMemory() = default;
  HostMemory(std::size_t bytes, HostSpace& space);
  explicit HostMemory(std::size_t bytes);  // in a space of its own
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;

  explicit operator bool() const { return data_ != nullptr; }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  // Unpins and gives the memory back. Throws AclError and keeps the block if unpinning fails.
  void release();

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  bool registered_ = false;  // else from aclrtMallocHost
};

// Blocks that are pinned ahead of their use by threads in the background. Thread-safe.
class HostReserve {
 public:
  // Starts to pin blocks of these sizes and returns. A block that cannot be had ends the work: who
  // needs it meets the reason.
  void prepare(int device, const std::vector<std::size_t>& sizes, unsigned threads);

  // A block of exactly this size: one that is ready, or a new one in `space`.
  HostMemory take(std::size_t bytes, HostSpace& space);

  void stop();                // ends the background work; what is ready stays
  bool wait(double seconds);  // until all that was asked for is ready; false: not in that time
  void clear() noexcept;      // stops and gives everything back
  // Bytes of those blocks that are ready, of blocks of these sizes.
  std::size_t ready_bytes(const std::vector<std::size_t>& sizes);

 private:
  void work(int device);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::size_t> wanted_;
  std::unique_ptr<HostSpace> space_;  // of those that are wanted
  std::multimap<std::size_t, HostMemory> ready_;
  std::size_t running_ = 0;
  std::vector<std::thread> threads_;
};

// Bytes that this process could still take: the machine's available memory, or what its control
// group leaves if that is less.
std::size_t available_host_bytes();

[[noreturn]] void throw_backup_does_not_fit(std::size_t needed, std::size_t available);

// Bytes of all live HostMemory blocks of this process.
std::size_t pinned_host_bytes();

}  // namespace camem
