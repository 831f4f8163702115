// SPDX-License-Identifier: Apache-2.0
//
// Host memory for backups: exact sizes, huge pages advised, never rounded up.
//
// Asynchronous copies need page-locked memory. It comes from aclrtMallocHost, or is mapped, locked
// and registered here. Memory that is neither is plain: copies to it go through the blocks of a
// Staging.
//
// Whoever touches a page first decides its NUMA node, and the threads that do inherit the affinity
// of the thread that sleeps: where the worker is bound to the node of its device, the backup lies
// there too.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace camem {

// How page-locked memory is had.
enum class HostSource : std::uint8_t { kAcl, kRegistered };

// What one operation is going to take of the host's memory, by several threads.
class HostSpace {
 public:
  explicit HostSpace(std::size_t bytes) : bytes_(bytes), unclaimed_(bytes) {}
  ~HostSpace();  // unmaps what nobody took
  HostSpace(const HostSpace&) = delete;
  HostSpace& operator=(const HostSpace&) = delete;

  // Takes `bytes` off what is left to take. Throws OutOfHostMemory when the machine could not give
  // all that is left any more, std::logic_error when nothing is left.
  void claim(std::size_t bytes);

  // Addresses for `bytes` that were claimed, which are the caller's to unmap. All are mapped in one
  // go: a thread that maps has to wait for all that touch their pages meanwhile, and they for it.
  // Throws OutOfHostMemory.
  std::byte* map(std::size_t bytes);

  // aclrtMallocHost failed once: nobody else of this operation asks it.
  std::atomic<bool> without_locking{false};

 private:
  std::mutex mutex_;
  const std::size_t bytes_;
  std::size_t unclaimed_;
  std::byte* next_ = nullptr;
  std::byte* end_ = nullptr;
};

// One block. Blocks are made on the calling thread, so that several threads make several at once.
class HostMemory {
 public:
  HostMemory() = default;
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;

  // Where memory cannot be mapped, locked or registered, whatever the reason, it comes from
  // aclrtMallocHost. Throws OutOfHostMemory or AclError.
  static HostMemory page_locked(std::size_t bytes, HostSource source, HostSpace& space);
  static HostMemory page_locked(std::size_t bytes, HostSource source);  // in a space of its own

  // Throws OutOfHostMemory.
  static HostMemory plain(std::size_t bytes, HostSpace& space);

  // Page-locked if that can be had, else plain. Throws OutOfHostMemory.
  static HostMemory any(std::size_t bytes, HostSource source, HostSpace& space);

  explicit operator bool() const { return data_ != nullptr; }
  bool is_page_locked() const { return data_ != nullptr && kind_ != Kind::kPlain; }
  bool is_registered() const { return data_ != nullptr && kind_ == Kind::kRegistered; }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  // Gives the memory back. Throws AclError and keeps the block if that fails.
  void release();

 private:
  enum class Kind : std::uint8_t { kPlain, kAcl, kRegistered };
  HostMemory(std::byte* data, std::size_t bytes, Kind kind);
  static HostMemory allocate(std::size_t bytes);
  static HostMemory map_and_register(std::size_t bytes, HostSpace& space);

  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  Kind kind_ = Kind::kPlain;
};

// Bytes that this process could still take: the machine's available memory, or what its control
// group leaves if that is less.
std::size_t available_host_bytes();

[[noreturn]] void throw_backup_does_not_fit(std::size_t needed, std::size_t available);

// Bytes of all live HostMemory blocks of this process that are page-locked, and of those that are
// not.
std::size_t page_locked_host_bytes();
std::size_t plain_host_bytes();

// Why the last block could not be registered, or page-locked at all; empty if none failed.
std::string last_locking_failure();

}  // namespace camem
