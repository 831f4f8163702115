// SPDX-License-Identifier: Apache-2.0
//
// Virtual memory management: reservations, physical memory, mappings.
#include <acl/acl.h>

#include <utility>

#include "error.h"
#include "faults.h"
#include "settings.h"
#include "state/context.h"
#include "state/machine.h"
#include "state/memory.h"

using sim::kGiB;
using sim::kMiB;
using sim::memory;
using sim::Physical;
using sim::Reservation;

namespace {

constexpr size_t kPage = 2 * kMiB;
constexpr size_t kReserveLimit = 128 * kGiB;
constexpr size_t kAddresses = 8192 * kGiB;  // per process

// Normal pages are allocated as huge ones too.
size_t granularity(aclrtMemAttr attribute) {
  switch (attribute) {
    case ACL_HBM_MEM_NORMAL:
    case ACL_HBM_MEM_P2P_NORMAL:
    case ACL_MEM_NORMAL:
    case ACL_MEM_P2P_NORMAL:
    case ACL_HBM_MEM_HUGE:
    case ACL_HBM_MEM_P2P_HUGE:
    case ACL_MEM_HUGE:
    case ACL_MEM_P2P_HUGE:
      return kPage;
    case ACL_HBM_MEM_HUGE1G:
    case ACL_HBM_MEM_P2P_HUGE1G:
    case ACL_MEM_HUGE1G:
    case ACL_MEM_P2P_HUGE1G:
      return kGiB;
    default:
      return 0;
  }
}

size_t addresses_taken() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  size_t bytes = 0;
  for (const auto& [address, reservation] : memory().reservations) bytes += reservation.bytes;
  return bytes;
}

// Pages of 1 GiB: not on a 310P, and on a 910B not for other devices.
bool chip_has(aclrtMemAttr attribute) {
  if (granularity(attribute) != kGiB) return true;
  const bool for_others = attribute == ACL_HBM_MEM_P2P_HUGE1G || attribute == ACL_MEM_P2P_HUGE1G;
  return for_others ? sim::settings().chip.has_1g_pages_for_others
                    : sim::settings().chip.has_1g_pages;
}

aclError check_property(const char* call, const aclrtPhysicalMemProp* property) {
  SIM_REQUIRE(property != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null property", call);
  SIM_REQUIRE(granularity(property->memAttr) != 0, ACL_ERROR_INVALID_PARAM,
              "%s: memAttr %d is not supported, use ACL_HBM_MEM_HUGE", call, property->memAttr);
  SIM_REQUIRE(property->handleType == ACL_MEM_HANDLE_TYPE_NONE, ACL_ERROR_INVALID_PARAM,
              "%s: handleType %d, only ACL_MEM_HANDLE_TYPE_NONE is supported", call,
              property->handleType);
  SIM_REQUIRE(property->allocationType == ACL_MEM_ALLOCATION_TYPE_PINNED, ACL_ERROR_INVALID_PARAM,
              "%s: allocationType %d, only ACL_MEM_ALLOCATION_TYPE_PINNED is supported", call,
              property->allocationType);
  SIM_REQUIRE(property->location.type == ACL_MEM_LOCATION_TYPE_DEVICE, ACL_ERROR_INVALID_PARAM,
              "%s: location type %d, only ACL_MEM_LOCATION_TYPE_DEVICE is supported", call,
              property->location.type);
  SIM_REQUIRE(property->reserve == 0, ACL_ERROR_RT_PARAM_INVALID, "%s: reserve must be 0", call);
  SIM_REQUIRE(chip_has(property->memAttr), ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: %s has no memory of the memAttr %d", call, sim::settings().chip.soc_name,
              property->memAttr);
  SIM_REQUIRE(property->location.id < sim::settings().visible.size(), ACL_ERROR_RT_INVALID_DEVICEID,
              "%s: there is no device %u", call, property->location.id);
  return ACL_SUCCESS;
}

// A reservation belongs to the device whose memory was mapped into it first, even after everything
// was unmapped. It holds memory of this process or imported memory, not both.
aclError check_one_kind(const char* call, const std::pair<const char* const, Reservation>& range,
                        const Physical& physical) {
  const auto& [base, reservation] = range;
  SIM_REQUIRE(!reservation.device || *reservation.device == physical.device,
              ACL_ERROR_RT_PARAM_INVALID,
              "%s: memory of another device was mapped into the reservation at %p", call,
              static_cast<const void*>(base));
  const auto mapping = memory().mappings.lower_bound(base);  // all are like the first
  const bool is_empty =
      mapping == memory().mappings.end() || mapping->first >= base + reservation.bytes;
  SIM_REQUIRE(is_empty || mapping->second.physical->imported == physical.imported,
              ACL_ERROR_RT_PARAM_INVALID,
              "%s: the reservation at %p holds imported memory or memory of this process, not both",
              call, static_cast<const void*>(base));
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

aclError aclrtReserveMemAddress(void** address, size_t size, size_t alignment, void* expected,
                                uint64_t flags) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(address != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null result", __func__);
  SIM_REQUIRE(size > 0, ACL_ERROR_INVALID_PARAM, "%s: size is 0", __func__);
  SIM_REQUIRE(flags <= 1, ACL_ERROR_INVALID_PARAM, "%s: unknown flags", __func__);
  SIM_REQUIRE(size <= kReserveLimit, ACL_ERROR_RT_PARAM_INVALID,
              "%s: %zu bytes, one call reserves at most %zu", __func__, size, kReserveLimit);
  SIM_REQUIRE(alignment == 0, ACL_ERROR_RT_PARAM_INVALID, "%s: alignment must be 0", __func__);
  SIM_REQUIRE(expected == nullptr, ACL_ERROR_RT_PARAM_INVALID,
              "%s: the expected address must be "
              "null",
              __func__);
  size_t rounded = (size + kPage - 1) / kPage * kPage;
  const bool fits = rounded <= kAddresses - addresses_taken();
  void* reserved = fits ? sim::device::reserve(rounded, kPage) : nullptr;
  SIM_REQUIRE(reserved != nullptr, ACL_ERROR_RT_MEMORY_ALLOCATION,
              "%s: no address space for %zu bytes", __func__, size);
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().reservations[static_cast<char*>(reserved)] = {rounded};
  *address = reserved;
  return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void* address) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(address != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null address", __func__);
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto reservation = memory().reservations.find(static_cast<char*>(address));
  SIM_REQUIRE(reservation != memory().reservations.end() && !reservation->second.is_malloc,
              ACL_ERROR_RT_PARAM_INVALID, "%s: %p is not the start of a reservation", __func__,
              address);
  size_t bytes = reservation->second.bytes;
  SIM_REQUIRE(!sim::overlaps(memory().mappings, address, bytes), ACL_ERROR_RT_DRV_INTERNAL_ERROR,
              "%s: memory is still mapped in the reservation at %p; unmap it first", __func__,
              address);
  memory().reservations.erase(reservation);
  sim::device::release(address, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp* property,
                                          aclrtMemGranularityOptions option, size_t* result) {
  SIM_CALL();
  SIM_REQUIRE(result != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null result", __func__);
  SIM_REQUIRE(option == ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM ||
                  option == ACL_RT_MEM_ALLOC_GRANULARITY_RECOMMENDED,
              ACL_ERROR_INVALID_PARAM, "%s: unknown option %d", __func__, option);
  if (aclError error = check_property(__func__, property)) return error;
  *result = granularity(property->memAttr);
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size,
                             const aclrtPhysicalMemProp* property, uint64_t flags) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null result", __func__);
  SIM_REQUIRE(size > 0, ACL_ERROR_INVALID_PARAM, "%s: size is 0", __func__);
  SIM_REQUIRE(flags == 0, ACL_ERROR_INVALID_PARAM, "%s: flags must be 0", __func__);
  if (aclError error = check_property(__func__, property)) return error;
  size_t unit = granularity(property->memAttr);
  SIM_REQUIRE(size % unit == 0, ACL_ERROR_RT_PARAM_INVALID,
              "%s: %zu bytes is not a multiple of the granularity, %zu", __func__, size, unit);
  int device = sim::settings().visible[property->location.id];
  auto physical = sim::make_physical(device, size);
  SIM_REQUIRE(physical != nullptr, ACL_ERROR_RT_MEMORY_ALLOCATION,
              "%s: out of memory: %zu bytes wanted, %zu of %zu free on device %u", __func__, size,
              sim::settings().hbm_bytes - sim::machine::taken(device), sim::settings().hbm_bytes,
              property->location.id);
  *handle = sim::physicals().add(physical);
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null handle", __func__);
  std::shared_ptr<sim::Physical> physical;  // freed after the lock, because that may be slow
  std::lock_guard<std::mutex> lock(memory().mutex);
  physical = sim::physicals().remove(handle);
  SIM_REQUIRE(physical != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a handle, or was freed", __func__, handle);
  return ACL_SUCCESS;  // memory that is still mapped is freed when it is unmapped
}

aclError aclrtMapMem(void* address, size_t size, size_t offset, aclrtDrvMemHandle handle,
                     uint64_t flags) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(address != nullptr && handle != nullptr && size > 0, ACL_ERROR_INVALID_PARAM,
              "%s: null address, null handle or size 0", __func__);
  SIM_REQUIRE(flags == 0, ACL_ERROR_INVALID_PARAM, "%s: flags must be 0", __func__);
  SIM_REQUIRE(offset == 0, ACL_ERROR_RT_PARAM_INVALID, "%s: offset must be 0", __func__);
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto physical = sim::physicals().find(handle);
  SIM_REQUIRE(physical != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a handle, or was freed", __func__, handle);
  SIM_REQUIRE(size == physical->bytes, ACL_ERROR_RT_PARAM_INVALID,
              "%s: size %zu is not the handle's, %zu", __func__, size, physical->bytes);
  SIM_REQUIRE(physical->mapped == nullptr, ACL_ERROR_RT_PARAM_INVALID,
              "%s: the handle is already mapped at %p", __func__,
              static_cast<const void*>(physical->mapped));
  auto* start = static_cast<char*>(address);
  SIM_REQUIRE(reinterpret_cast<uintptr_t>(start) % kPage == 0, ACL_ERROR_RT_PARAM_INVALID,
              "%s: the address %p is not a multiple of %zu", __func__, address, kPage);
  auto reservation = sim::find_containing(memory().reservations, start);
  bool inside = reservation != memory().reservations.end() && !reservation->second.is_malloc &&
                start + size <= reservation->first + reservation->second.bytes;
  SIM_REQUIRE(inside, ACL_ERROR_RT_PARAM_INVALID, "%s: [%p, +%zu) does not lie in one reservation",
              __func__, address, size);
  SIM_REQUIRE(!sim::overlaps(memory().mappings, start, size), ACL_ERROR_RT_PARAM_INVALID,
              "%s: part of [%p, +%zu) is already mapped", __func__, address, size);
  if (aclError error = check_one_kind(__func__, *reservation, *physical)) return error;
  SIM_REQUIRE(sim::device::map(start, physical->memory), ACL_ERROR_RT_DRV_INTERNAL_ERROR,
              "%s: the device cannot map %zu bytes", __func__, size);
  physical->mapped = start;
  reservation->second.device = physical->device;
  memory().mappings[start] = {size, physical};
  return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void* address) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(address != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null address", __func__);
  std::unique_lock<std::mutex> lock(memory().mutex);
  auto mapping = memory().mappings.find(static_cast<char*>(address));
  auto reservation = sim::find_containing(memory().reservations, address);
  SIM_REQUIRE(mapping != memory().mappings.end() && !reservation->second.is_malloc,
              ACL_ERROR_RT_DRV_INTERNAL_ERROR, "%s: %p is not the start of a mapping", __func__,
              address);
  sim::require_unused(__func__, address, mapping->second.bytes);
  auto physical = mapping->second.physical;
  memory().mappings.erase(mapping);
  physical->mapped = nullptr;
  sim::device::unmap(address, physical->memory);
  return ACL_SUCCESS;
}

// The owning device and the process's other devices have access from the start.
aclError aclrtMemSetAccess(void* address, size_t size, aclrtMemAccessDesc* access, size_t count) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(access != nullptr && count > 0, ACL_ERROR_RT_PARAM_INVALID, "%s: no access given",
              __func__);
  SIM_REQUIRE(sim::is_device_range(address, size), ACL_ERROR_RT_PARAM_INVALID,
              "%s: [%p, +%zu) is not mapped", __func__, address, size);
  for (size_t i = 0; i < count; ++i) {
    SIM_REQUIRE(access[i].location.type == ACL_MEM_LOCATION_TYPE_DEVICE &&
                    access[i].location.id < sim::settings().visible.size(),
                ACL_ERROR_RT_PARAM_INVALID, "%s: location %zu is not a device", __func__, i);
  }
  return ACL_SUCCESS;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType, uint64_t,
                                         uint64_t* shareable) {
  SIM_CALL();
  SIM_REQUIRE(shareable != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null result", __func__);
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto physical = sim::physicals().find(handle);
  SIM_REQUIRE(physical != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: %p is not a handle, or was freed", __func__, handle);
  SIM_REQUIRE(sim::device::share(physical->memory, shareable), ACL_ERROR_RT_DRV_INTERNAL_ERROR,
              "%s: the memory cannot be shared", __func__);
  return ACL_SUCCESS;
}

aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t* pids, size_t count) {
  SIM_CALL();
  SIM_REQUIRE(pids != nullptr && count > 0, ACL_ERROR_RT_PARAM_INVALID, "%s: no process given",
              __func__);
  return ACL_SUCCESS;
}

aclError aclrtMemImportFromShareableHandle(uint64_t shareable, int32_t index,
                                           aclrtDrvMemHandle* handle) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  SIM_REQUIRE(handle != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null result", __func__);
  SIM_REQUIRE(index >= 0 && index < static_cast<int32_t>(sim::settings().visible.size()),
              ACL_ERROR_RT_INVALID_DEVICEID, "%s: there is no device %d", __func__, index);
  auto physical = std::make_shared<sim::Physical>();
  physical->imported = true;
  physical->device = sim::settings().visible[index];
  physical->memory = sim::device::open_shared(physical->device, shareable, &physical->bytes);
  SIM_REQUIRE(physical->memory != nullptr, ACL_ERROR_RT_INVALID_HANDLE,
              "%s: no process shares memory as %llx", __func__,
              static_cast<unsigned long long>(shareable));
  *handle = sim::physicals().add(physical);
  return ACL_SUCCESS;
}

}  // extern "C"
