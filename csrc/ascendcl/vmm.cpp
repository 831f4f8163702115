// SPDX-License-Identifier: Apache-2.0
#include "ascendcl/vmm.h"

#include <utility>

#include "ascendcl/check.h"

namespace camem {
namespace {

// The only place that decides what kind of device memory this project allocates.
aclrtPhysicalMemProp physical_property(int device) {
  aclrtPhysicalMemProp property{};
  property.handleType = ACL_MEM_HANDLE_TYPE_NONE;
  property.allocationType = ACL_MEM_ALLOCATION_TYPE_PINNED;
  property.memAttr = ACL_HBM_MEM_HUGE;
  property.location.id = static_cast<uint32_t>(device);
  property.location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
  return property;
}

}  // namespace

std::size_t granularity(int device) {
  aclrtPhysicalMemProp property = physical_property(device);
  std::size_t bytes = 0;
  CAMEM_CHECK(
      aclrtMemGetAllocationGranularity(&property, ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM, &bytes), 0);
  return bytes;
}

Reservation::Reservation(std::size_t bytes) : bytes_(bytes) {
  void* base = nullptr;
  CAMEM_CHECK(aclrtReserveMemAddress(&base, bytes, 0, nullptr, 0), bytes);
  base_ = static_cast<std::byte*>(base);
}

Reservation::~Reservation() {
  if (base_ != nullptr) CAMEM_CHECK_NOEXCEPT(aclrtReleaseMemAddress(base_), bytes_);
}

Reservation::Reservation(Reservation&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Reservation::release() {
  if (base_ == nullptr) return;
  CAMEM_CHECK(aclrtReleaseMemAddress(base_), bytes_);
  base_ = nullptr;
}

PhysicalMemory::PhysicalMemory(int device, std::size_t bytes) : bytes_(bytes) {
  const aclrtPhysicalMemProp property = physical_property(device);
  CAMEM_CHECK(aclrtMallocPhysical(&handle_, bytes, &property, 0), bytes);
}

PhysicalMemory::~PhysicalMemory() {
  if (mapped()) CAMEM_CHECK_NOEXCEPT(aclrtUnmapMem(address_), bytes_);
  if (handle_ != nullptr) CAMEM_CHECK_NOEXCEPT(aclrtFreePhysical(handle_), bytes_);
}

PhysicalMemory::PhysicalMemory(PhysicalMemory&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      address_(std::exchange(other.address_, nullptr)) {}

PhysicalMemory& PhysicalMemory::operator=(PhysicalMemory&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(bytes_, other.bytes_);
  std::swap(address_, other.address_);
  return *this;
}

void PhysicalMemory::map(std::byte* address) {
  CAMEM_CHECK(aclrtMapMem(address, bytes_, 0, handle_, 0), bytes_);
  address_ = address;
}

void PhysicalMemory::unmap() {
  CAMEM_CHECK(aclrtUnmapMem(address_), bytes_);
  address_ = nullptr;
}

void PhysicalMemory::release() {
  CAMEM_CHECK(aclrtFreePhysical(handle_), bytes_);
  handle_ = nullptr;
}

}  // namespace camem
