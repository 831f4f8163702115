// SPDX-License-Identifier: Apache-2.0
//
// Owners of AscendCL's virtual-memory objects. Each is move-only; explicit verbs (release, map,
// unmap) throw and leave the object as it was when the call fails, so they can be retried;
// destructors never throw.
//
// Sizes are bytes and multiples of granularity(). None of these calls synchronises the device:
// the caller does, before unmapping.
#pragma once

#include <acl/acl.h>

#include <cstddef>

namespace camem {

// Bytes of which every physical size on `device` is a multiple (2 MiB on current chips).
std::size_t granularity(int device);

// A range of virtual addresses without memory behind it.
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

// Physical device memory, and whether it is mapped somewhere.
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
