// SPDX-License-Identifier: Apache-2.0
//
// A CUDA device under the simulated AscendCL, so that the allocator can be measured on hardware.
//
// AscendCL's virtual-memory calls map one to one to CUDA's. This device differs from the other one
// in three ways: new physical memory is not poisoned, which would distort measurements; memory
// cannot be shared with other processes by key; and torch's streams are unknown here, so the caller
// synchronises torch before memory sleeps.
#include "device/cuda.h"

namespace sim::device {

struct Physical {
  CUmemGenericAllocationHandle handle;
  size_t bytes;
  int device;
};

namespace {

constexpr size_t kUnit = size_t{2} << 20;  // granularity of CUDA's physical memory

size_t round_up(size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

CUdeviceptr pointer(void* address) { return reinterpret_cast<CUdeviceptr>(address); }

// The driver's functions come from the library that the runtime has loaded, so nothing is linked.
template <typename Function>
Function driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kVersion = 12000;
  cuda::require(
      cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &found), name);
  if (function == nullptr) fault("%s: the CUDA driver does not have it", name);
  return reinterpret_cast<Function>(function);
}

#define DRIVER(name) driver<decltype(&::name)>(#name)

CUmemLocation location(int device) {
  CUmemLocation location = {};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

}  // namespace

void* reserve(size_t bytes, size_t alignment) {
  static const auto address_reserve = DRIVER(cuMemAddressReserve);
  CUdeviceptr address = 0;
  CUresult result = address_reserve(&address, round_up(bytes), round_up(alignment), 0, 0);
  return result == CUDA_SUCCESS ? reinterpret_cast<void*>(address) : nullptr;
}

void release(void* address, size_t bytes) {
  static const auto address_free = DRIVER(cuMemAddressFree);
  address_free(pointer(address), round_up(bytes));
}

Physical* create_physical(int device, size_t bytes) {
  static const auto create = DRIVER(cuMemCreate);
  cuda::use(device);
  CUmemAllocationProp property = {};
  property.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  property.location = location(device);
  CUmemGenericAllocationHandle handle;
  if (create(&handle, round_up(bytes), &property, 0) != CUDA_SUCCESS) return nullptr;
  return new Physical{handle, round_up(bytes), device};
}

void destroy_physical(Physical* memory) {
  static const auto release_handle = DRIVER(cuMemRelease);
  release_handle(memory->handle);
  delete memory;
}

bool map(void* address, Physical* memory) {
  static const auto map_memory = DRIVER(cuMemMap);
  static const auto set_access = DRIVER(cuMemSetAccess);
  static const auto unmap_memory = DRIVER(cuMemUnmap);
  cuda::use(memory->device);
  if (map_memory(pointer(address), memory->bytes, 0, memory->handle, 0) != CUDA_SUCCESS) {
    return false;
  }
  CUmemAccessDesc access = {};
  access.location = location(memory->device);
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (set_access(pointer(address), memory->bytes, &access, 1) == CUDA_SUCCESS) return true;
  unmap_memory(pointer(address), memory->bytes);
  return false;
}

void unmap(void* address, Physical* memory) {
  static const auto unmap_memory = DRIVER(cuMemUnmap);
  cuda::use(memory->device);
  if (unmap_memory(pointer(address), memory->bytes) != CUDA_SUCCESS) {
    fault("cuMemUnmap failed at %p", address);
  }
}

bool share(Physical*, uint64_t*) { return false; }
Physical* open_shared(int, uint64_t, size_t*) { return nullptr; }

void* allocate_host(size_t bytes) {
  void* address = nullptr;
  return cudaHostAlloc(&address, bytes, cudaHostAllocPortable) == cudaSuccess ? address : nullptr;
}

void free_host(void* address, size_t) { cudaFreeHost(address); }

const bool kRegisteringPins = true;

bool register_host(void* address, size_t bytes) {
  return cudaHostRegister(address, bytes, cudaHostRegisterPortable) == cudaSuccess;
}

void unregister_host(void* address) { cudaHostUnregister(address); }

bool copy(int device, void* to, const void* from, size_t bytes, Direction direction) {
  cuda::use(device);
  return cudaMemcpy(to, from, bytes, cuda::kind_of(direction)) == cudaSuccess;
}

bool fill(int device, void* address, int value, size_t bytes) {
  cuda::use(device);
  return cudaMemset(address, value, bytes) == cudaSuccess;
}

}  // namespace sim::device
