// SPDX-License-Identifier: Apache-2.0
//
// Host memory for backups: exact sizes, huge pages advised, never rounded up.
//
// Asynchronous copies need page-locked memory. It comes from aclrtMallocHost, or is mapped, locked
// and registered here. Other memory is plain, and copies to it go through the blocks of a Staging.
//
// The first touch of a page decides its NUMA node. The threads that touch pages inherit the
// affinity of the thread that calls sleep, so if the worker is bound to the node of its device, the
// backup is there too.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace camem {

// The source of page-locked memory.
enum class HostSource : std::uint8_t { kAcl, kRegistered };

// The host memory that the threads of an operation are going to allocate.
class HostSpace {
 public:
  explicit HostSpace(std::size_t bytes) : bytes_(bytes), unclaimed_(bytes) {}
  ~HostSpace();  // unmaps what was not used
  HostSpace(const HostSpace&) = delete;
  HostSpace& operator=(const HostSpace&) = delete;

  // Claims a part of the space. Throws OutOfHostMemory if the machine no longer has enough for the
  // unclaimed part, and std::logic_error if less than `bytes` is unclaimed.
  void claim(std::size_t bytes);

  // Returns addresses for claimed `bytes`; the caller unmaps them. The whole space is mapped at
  // once, because mapping and touching pages block each other across threads. Throws
  // OutOfHostMemory.
  std::byte* map(std::size_t bytes);

  // aclrtMallocHost failed once, so this operation does not try it again.
  std::atomic<bool> without_locking{false};

 private:
  std::mutex mutex_;
  const std::size_t bytes_;
  std::size_t unclaimed_;
  std::byte* next_ = nullptr;
  std::byte* end_ = nullptr;
};

// A block of host memory. The calling thread does the work, so several threads work in parallel.
class HostMemory {
 public:
  HostMemory() = default;
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;

  // Where memory cannot be mapped, locked or registered, whatever the reason, it comes from
  // aclrtMallocHost, and so does all that is asked for afterwards. Throws OutOfHostMemory or
  // AclError.
  static HostMemory page_locked(std::size_t bytes, HostSource source, HostSpace& space);
  static HostMemory page_locked(std::size_t bytes, HostSource source);  // in a space of its own

  // Throws OutOfHostMemory.
  static HostMemory plain(std::size_t bytes, HostSpace& space);

  // Page-locked if possible, otherwise plain. Throws OutOfHostMemory.
  static HostMemory any(std::size_t bytes, HostSource source, HostSpace& space);

  explicit operator bool() const { return data_ != nullptr; }
  bool is_page_locked() const { return data_ != nullptr && kind_ != Kind::kPlain; }
  bool is_registered() const { return data_ != nullptr && kind_ == Kind::kRegistered; }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

  // Frees the memory. If that fails, throws AclError and keeps the block.
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

// Bytes that this process can still allocate: the machine's available memory, or what its control
// group leaves if that is less.
std::size_t available_host_bytes();

// With `moves`, a backup on disk does not fit.
[[noreturn]] void throw_backup_does_not_fit(std::size_t needed, std::size_t available,
                                            bool moves = false);

// Bytes of this process's page-locked HostMemory blocks, and of its plain ones.
std::size_t page_locked_host_bytes();
std::size_t plain_host_bytes();

// Why the last block could not be registered or page-locked; empty if none failed.
std::string last_locking_failure();

// Why no block is registered any more: one could not be locked or registered. Empty: none failed
// since that was forgotten.
std::string registering_failure();
void forget_registering_failure();

}  // namespace camem
