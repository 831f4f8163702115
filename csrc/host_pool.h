// SPDX-License-Identifier: Apache-2.0
//
// Pinned host memory for backups: exact sizes, huge pages advised, never rounded up.
#pragma once

#include <cstddef>

namespace camem {

// One pinned block. The constructor maps, touches and registers it on the calling thread, so that
// several threads make several blocks at once; where registering is not available the block comes
// from aclrtMallocHost. Throws OutOfHostMemory or AclError.
class HostMemory {
 public:
  HostMemory() = default;
  explicit HostMemory(std::size_t bytes);
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

// Bytes that this process could still take: the machine's available memory, or what its control
// group leaves if that is less.
std::size_t available_host_bytes();

// Bytes of all live HostMemory blocks of this process.
std::size_t pinned_host_bytes();

}  // namespace camem
