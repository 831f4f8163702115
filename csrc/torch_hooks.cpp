// SPDX-License-Identifier: Apache-2.0
//
// The two functions that torch's pluggable allocator calls. torch holds its allocator lock, and may
// not hold the GIL, so nothing here calls Python or throws.
#include <acl/acl.h>
#include <sys/types.h>

#include <cstdio>

#include "ascendcl/check.h"
#include "pool/pool.h"

#define CAMEM_EXPORT extern "C" __attribute__((visibility("default")))

// Returns at least `size` bytes of device memory with the calling thread's current tag. If it
// returns nullptr, torch frees its caches and retries, then raises torch.OutOfMemoryError.
CAMEM_EXPORT void* camem_malloc(ssize_t size, int device, aclrtStream) {
  if (size <= 0) return nullptr;
  try {
    return camem::Pool::instance().allocate(static_cast<std::size_t>(size), device);
  } catch (const camem::OutOfDeviceMemory&) {
    return nullptr;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "vllm_sleep_ascend: allocating %zd bytes on device %d: %s\n", size, device,
                 error.what());
    return nullptr;
  }
}

// Runs when a memory pool is destroyed, possibly while its memory sleeps or at interpreter exit.
CAMEM_EXPORT void camem_free(void* address, ssize_t, int, aclrtStream stream) {
  camem::Pool::instance().free(address, stream);
}
