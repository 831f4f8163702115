// SPDX-License-Identifier: Apache-2.0
//
// Owners of AscendCL's virtual-memory objects. They are move-only. Explicit operations (release,
// map, unmap) throw if the call fails and leave the object unchanged, so they can be retried;
// destructors never throw.
//
// Sizes are bytes and multiples of granularity(). Nothing here synchronises the device: the caller
// must do that before unmapping.
#pragma once

#include <acl/acl.h>

#include <cstddef>

namespace camem {

// Physical sizes on `device` are multiples of this many bytes (2 MiB on current chips).
std::size_t granularity(int device);

// A range of virtual addresses without memory.
class Reservation {
 public:
  Reservation() = default;
  explicit Reservation(std::size_t bytes);
  ~Reservation();
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;

  std::byte* base() const { return base_; }
  std::size_t bytes() const { return bytes_; }
  void release();

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
};

// Physical device memory, and its mapping.
class PhysicalMemory {
 public:
  PhysicalMemory() = default;
  PhysicalMemory(int device, std::size_t bytes);
  ~PhysicalMemory();
  PhysicalMemory(PhysicalMemory&& other) noexcept;
  PhysicalMemory& operator=(PhysicalMemory&& other) noexcept;

  explicit operator bool() const { return handle_ != nullptr; }
  bool mapped() const { return address_ != nullptr; }
  void map(std::byte* address);
  void unmap();
  void release();  // must be unmapped

 private:
  aclrtDrvMemHandle handle_ = nullptr;
  std::size_t bytes_ = 0;
  std::byte* address_ = nullptr;
};

}  // namespace camem
