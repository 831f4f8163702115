// SPDX-License-Identifier: Apache-2.0
//
// Device memory without virtual memory management: aclrtMalloc, and the device's total and free
// memory.
#include "state/memory.h"

#include <acl/acl.h>

#include "control.h"
#include "error.h"
#include "faults.h"
#include "settings.h"
#include "state/context.h"
#include "state/machine.h"

using sim::kMiB;
using sim::memory;

namespace {

constexpr size_t kSmall = kMiB;
constexpr size_t kSmallUnit = 4096;
constexpr size_t kLargeUnit = 2 * kMiB;

aclError allocate(const char* call, void** result, size_t size, bool for_a_library = false) {
  SIM_REQUIRE(result != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null result", call);
  SIM_REQUIRE(size > 0, ACL_ERROR_RT_PARAM_INVALID, "%s: size is 0", call);
  sim::Context* context = sim::current_context();
  SIM_REQUIRE(context != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  size_t unit = size <= kSmall ? kSmallUnit : kLargeUnit;
  size_t bytes = (size + unit - 1) / unit * unit;
  auto physical = bytes < size ? nullptr : sim::make_physical(context->physical, bytes);
  SIM_REQUIRE(physical != nullptr, ACL_ERROR_RT_MEMORY_ALLOCATION,
              "%s: out of memory: %zu bytes wanted, %zu of %zu free on device %d", call, size,
              sim::settings().hbm_bytes - sim::machine::taken(context->physical),
              sim::settings().hbm_bytes, context->index);
  auto* address = static_cast<char*>(sim::device::reserve(bytes, unit));
  bool mapped = address != nullptr && sim::device::map(address, physical->memory);
  if (!mapped && address != nullptr) sim::device::release(address, bytes);
  SIM_REQUIRE(mapped, ACL_ERROR_RT_DRV_INTERNAL_ERROR, "%s: the device cannot map %zu bytes", call,
              bytes);
  physical->mapped = address;
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().reservations[address] = {bytes, true, for_a_library, context->physical};
  memory().mappings[address] = {bytes, physical};
  *result = address;
  return ACL_SUCCESS;
}

aclError deallocate(const char* call, void* pointer) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto* address = static_cast<char*>(pointer);
  auto reservation = memory().reservations.find(address);
  SIM_REQUIRE(reservation != memory().reservations.end() && reservation->second.is_malloc,
              ACL_ERROR_RT_PARAM_INVALID, "%s: %p is not from aclrtMalloc, or was freed", call,
              pointer);
  size_t bytes = reservation->second.bytes;
  sim::require_unused(call, address, bytes);
  auto physical = memory().mappings[address].physical;
  memory().mappings.erase(address);
  memory().reservations.erase(reservation);
  sim::device::unmap(address, physical->memory);
  sim::device::release(address, bytes);
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

aclError npuSimAllocate(void** pointer, size_t bytes) {
  return allocate("simulated library", pointer, bytes, true);
}

aclError npuSimFree(void* pointer) { return deallocate("simulated library", pointer); }

aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) {
  SIM_CALL();
  return allocate("aclrtMalloc", pointer, size);
}

aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy) {
  SIM_CALL();
  return allocate("aclrtMallocAlign32", pointer, size);
}

aclError aclrtMallocCached(void** pointer, size_t size, aclrtMemMallocPolicy) {
  SIM_CALL();
  return allocate("aclrtMallocCached", pointer, size);
}

aclError aclrtMallocWithCfg(void** pointer, size_t size, aclrtMemMallocPolicy, aclrtMallocConfig*) {
  SIM_CALL();
  return allocate("aclrtMallocWithCfg", pointer, size);
}

aclError aclrtFree(void* pointer) {
  SIM_CALL();
  SIM_CONTEXT(context);
  (void)context;
  return deallocate("aclrtFree", pointer);
}

aclError aclrtFreeWithDevSync(void* pointer) {
  SIM_CALL();
  SIM_CONTEXT(context);
  if (aclError error = sim::synchronize(__func__, *context, -1)) return error;
  return deallocate("aclrtFreeWithDevSync", pointer);
}

aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t* free, size_t* total) {
  SIM_CALL();
  SIM_REQUIRE(free != nullptr && total != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null result",
              __func__);
  SIM_CONTEXT(context);
  bool is_ddr = attribute == ACL_DDR_MEM || attribute == ACL_DDR_MEM_HUGE ||
                attribute == ACL_DDR_MEM_NORMAL || attribute == ACL_DDR_MEM_P2P_HUGE ||
                attribute == ACL_DDR_MEM_P2P_NORMAL;
  SIM_REQUIRE(attribute >= ACL_DDR_MEM && attribute <= ACL_MEM_P2P_HUGE1G,
              ACL_ERROR_RT_INVALID_MEMORY_TYPE, "%s: unknown attribute %d", __func__, attribute);
  size_t taken = sim::machine::taken(context->physical);
  *total = is_ddr && sim::settings().chip.has_hbm ? 0 : sim::settings().hbm_bytes;
  *free = *total > taken ? *total - taken : 0;
  return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  SIM_CALL();
  SIM_REQUIRE(pointer != nullptr && attributes != nullptr, ACL_ERROR_RT_PARAM_INVALID,
              "%s: null argument", __func__);
  *attributes = {};
  int device = 0;
  if (sim::is_device_range(pointer, 1, &device)) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
    auto& visible = sim::settings().visible;
    for (size_t i = 0; i < visible.size(); ++i) {
      if (visible[i] == device) attributes->location.id = static_cast<uint32_t>(i);
    }
    attributes->pageSize = 2 * kMiB;
  } else if (sim::is_known_host(pointer)) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
    attributes->pageSize = 4096;
  } else {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  }
  return ACL_SUCCESS;
}

}  // extern "C"
