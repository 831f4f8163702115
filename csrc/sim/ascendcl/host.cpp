// SPDX-License-Identifier: Apache-2.0
//
// Host memory for asynchronous copies.
#include <acl/acl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <vector>

#include "error.h"
#include "faults.h"
#include "settings.h"
#include "state/context.h"
#include "state/memory.h"
#include "state/page_locks.h"

using sim::memory;

namespace {

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t kAllocationLimit = 200 * sim::kGiB;

aclError allocate(const char* call, void** result, size_t size) {
  SIM_REQUIRE(result != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null result", call);
  SIM_REQUIRE(size > 0, ACL_ERROR_INVALID_PARAM, "%s: size is 0", call);
  SIM_REQUIRE(sim::current_context() != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  SIM_REQUIRE(size <= kAllocationLimit, ACL_ERROR_RT_MEMORY_ALLOCATION,
              "%s: %zu bytes in one call, at most %zu", call, size, kAllocationLimit);
  size_t bytes = (size + kPage - 1) / kPage * kPage;
  void* address = sim::device::allocate_host(bytes);
  SIM_REQUIRE(address != nullptr, ACL_ERROR_RT_MEMORY_ALLOCATION,
              "%s: no host memory for %zu bytes", call, size);
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().pinned[static_cast<char*>(address)] = {bytes};
  *result = address;
  return ACL_SUCCESS;
}

aclError deallocate(const char* call, void* pointer) {
  SIM_REQUIRE(pointer != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null address", call);
  SIM_REQUIRE(sim::current_context() != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto block = memory().pinned.find(static_cast<char*>(pointer));
  SIM_REQUIRE(block != memory().pinned.end(), ACL_ERROR_RT_PARAM_INVALID,
              "%s: %p is not from aclrtMallocHost, or was freed", call, pointer);
  const size_t bytes = block->second.bytes;
  if (sim::overlaps(memory().registered, pointer, bytes)) {
    sim::fault("%s(%p): the memory is still registered, unregister it first", call, pointer);
  }
  sim::require_unused(call, pointer, bytes);
  sim::device::free_host(pointer, bytes);
  memory().pinned.erase(block);
  return ACL_SUCCESS;
}

// Whether every page of the range is mapped into the process.
bool exists(void* pointer, uint64_t size) {
  std::vector<unsigned char> pages((size + kPage - 1) / kPage);
  return mincore(pointer, size, pages.data()) == 0 || errno != ENOMEM;
}

// Memory of aclrtMallocHost is already page-locked: it can be mapped for the device, but not
// pinned.
aclError check_pinned(const char* call, const char* pointer, uint64_t size, uint32_t flag) {
  if (!sim::overlaps(memory().pinned, pointer, size)) return ACL_SUCCESS;
  SIM_REQUIRE((flag & ACL_HOST_REG_PINNED) == 0, ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
              "%s: %p is page-locked memory of aclrtMallocHost", call, pointer);
  auto block = sim::find_containing(memory().pinned, pointer);
  SIM_REQUIRE(
      block != memory().pinned.end() && pointer + size <= block->first + block->second.bytes,
      ACL_ERROR_RT_PARAM_INVALID, "%s: [%p, +%llu) is only in part from aclrtMallocHost", call,
      pointer, static_cast<unsigned long long>(size));
  return ACL_SUCCESS;
}

aclError register_range(const char* call, void* pointer, uint64_t size, uint32_t flag) {
  SIM_REQUIRE(pointer != nullptr && size > 0, ACL_ERROR_INVALID_PARAM, "%s: null address or size 0",
              call);
  SIM_REQUIRE(reinterpret_cast<uintptr_t>(pointer) % kPage == 0, ACL_ERROR_RT_PARAM_INVALID,
              "%s: the address %p is not a multiple of %zu", call, pointer, kPage);
  SIM_REQUIRE(sim::current_context() != nullptr, ACL_ERROR_RT_CONTEXT_NULL,
              "%s: this thread has no context; call aclrtSetDevice", call);
  bool asks_driver_to_pin =
      (flag & ACL_HOST_REG_PINNED) != 0 && sim::settings().driver.at_least(sim::kPinningDriver);
  SIM_REQUIRE(!asks_driver_to_pin || sim::settings().kernel.at_least(sim::kPinningKernel),
              ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: the driver pins no memory on this kernel",
              call);
  std::unique_lock<std::mutex> lock(memory().mutex);
  SIM_REQUIRE(!sim::overlaps(memory().reservations, pointer, size), ACL_ERROR_RT_PARAM_INVALID,
              "%s: %p is device memory", call, pointer);
  SIM_REQUIRE(!sim::overlaps(memory().registered, pointer, size),
              ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
              "%s: part of [%p, +%llu) is already registered", call, pointer,
              static_cast<unsigned long long>(size));
  auto* begin = static_cast<char*>(pointer);
  if (aclError error = check_pinned(call, begin, size, flag)) return error;
  SIM_REQUIRE(exists(pointer, size), ACL_ERROR_RT_PARAM_INVALID,
              "%s: part of [%p, +%llu) is not memory of this process", call, pointer,
              static_cast<unsigned long long>(size));
  bool is_pinned = sim::overlaps(memory().pinned, pointer, size);
  memory().registered[begin] = {size, (flag & ACL_HOST_REG_MAPPED) != 0, std::nullopt};
  lock.unlock();  // pinning is slow, and several threads pin in parallel
  if (is_pinned || sim::device::register_host(pointer, size)) return ACL_SUCCESS;
  lock.lock();
  memory().registered.erase(begin);
  return sim::fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: the memory cannot be pinned", call);
}

}  // namespace

extern "C" {

aclError aclrtMallocHost(void** pointer, size_t size) {
  SIM_CALL();
  return allocate("aclrtMallocHost", pointer, size);
}

aclError aclrtMallocHostWithCfg(void** pointer, uint64_t size, aclrtMallocConfig*) {
  SIM_CALL();
  return allocate("aclrtMallocHostWithCfg", pointer, size);
}

aclError aclrtFreeHost(void* pointer) {
  SIM_CALL();
  return deallocate("aclrtFreeHost", pointer);
}

aclError aclrtFreeHostWithDevSync(void* pointer) {
  SIM_CALL();
  SIM_CONTEXT(context);
  if (aclError error = sim::synchronize(__func__, *context, -1)) return error;
  return deallocate("aclrtFreeHostWithDevSync", pointer);
}

// Host and device share addresses here, so a registered range is its own device address.
aclError aclrtHostRegister(void* pointer, uint64_t size, aclrtHostRegisterType type,
                           void** device_pointer) {
  SIM_CALL();
  SIM_REQUIRE(device_pointer != nullptr, ACL_ERROR_RT_PARAM_INVALID, "%s: null result", __func__);
  SIM_REQUIRE(type == ACL_HOST_REGISTER_MAPPED, ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: type %d, only ACL_HOST_REGISTER_MAPPED is supported", __func__, type);
  aclError error = register_range("aclrtHostRegister", pointer, size, ACL_HOST_REG_MAPPED);
  if (error != ACL_SUCCESS) return error;
  *device_pointer = pointer;
  return ACL_SUCCESS;
}

aclError aclrtHostRegisterV2(void* pointer, uint64_t size, uint32_t flag) {
  SIM_CALL();
  constexpr uint32_t kSupported = ACL_HOST_REG_MAPPED | ACL_HOST_REG_PINNED;
  SIM_REQUIRE(flag != 0 && (flag & ~kSupported) == 0, ACL_ERROR_RT_PARAM_INVALID,
              "%s: flag %#x, only ACL_HOST_REG_MAPPED and ACL_HOST_REG_PINNED are supported",
              __func__, flag);
  return register_range("aclrtHostRegisterV2", pointer, size, flag);
}

aclError aclrtHostGetDevicePointer(void* pointer, void** device_pointer, uint32_t flag) {
  SIM_CALL();
  SIM_REQUIRE(pointer != nullptr && device_pointer != nullptr && flag == 0,
              ACL_ERROR_RT_PARAM_INVALID, "%s: null argument, or flag not 0", __func__);
  std::lock_guard<std::mutex> lock(memory().mutex);
  auto range = memory().registered.find(static_cast<char*>(pointer));
  SIM_REQUIRE(range != memory().registered.end() && range->second.is_mapped,
              ACL_ERROR_RT_PARAM_INVALID, "%s: %p is not the start of memory registered as mapped",
              __func__, pointer);
  *device_pointer = pointer;
  return ACL_SUCCESS;
}

aclError aclrtHostUnregister(void* pointer) {
  SIM_CALL();
  SIM_REQUIRE(pointer != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null address", __func__);
  SIM_CONTEXT(context);
  (void)context;
  std::unique_lock<std::mutex> lock(memory().mutex);
  auto range = memory().registered.find(static_cast<char*>(pointer));
  SIM_REQUIRE(range != memory().registered.end(), ACL_ERROR_HOST_MEMORY_NOT_REGISTERED,
              "%s: %p is not the start of a registered range", __func__, pointer);
  sim::require_unused(__func__, pointer, range->second.bytes);
  memory().registered.erase(range);
  bool is_pinned = sim::overlaps(memory().pinned, pointer, 1);
  lock.unlock();
  if (!is_pinned) sim::device::unregister_host(pointer);
  return ACL_SUCCESS;
}

}  // extern "C"
