// SPDX-License-Identifier: Apache-2.0
//
// What headers older than CANN 8.5 lack or may lack, under our own names, so that this project
// compiles with any of them. The functions are looked up at run time (optional.h).
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <cstdint>

namespace camem {

// ACL_ERROR_RT_CONTEXT_NULL
constexpr aclError kContextNull = 107002;

// ACL_ERROR_RT_STREAM_CAPTURED
constexpr aclError kStreamCaptured = 107027;

// ACL_ERROR_BAD_ALLOC
constexpr aclError kBadAlloc = 200000;

// ACL_ERROR_RT_MEMORY_ALLOCATION
constexpr aclError kMemoryAllocation = 207001;

// ACL_ERROR_RT_DEVICE_OOM
constexpr aclError kDeviceOom = 207018;

// ACL_ERROR_RT_STREAM_SYNC_TIMEOUT
constexpr aclError kStreamSyncTimeout = 507046;

// ACL_HOST_REG_PINNED
constexpr uint32_t kHostRegisterPinned = 0x10000000;

// aclrtMemUsageInfo
struct MemUsageInfo {
  char name[32];
  uint64_t current;
  uint64_t peak;
  std::size_t reserved[8];
};

using CaptureGetInfo = aclError (*)(aclrtStream, int32_t*, void**);
using GetMemUsageInfo = aclError (*)(int32_t, MemUsageInfo*, std::size_t, std::size_t*);
using GetStreamAvailableNum = aclError (*)(uint32_t*);
using HostRegisterV2 = aclError (*)(void*, uint64_t, uint32_t);
using HostUnregister = aclError (*)(void*);

}  // namespace camem
