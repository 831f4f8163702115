// SPDX-License-Identifier: Apache-2.0
//
// Functions that the framework links and that have no use here: dumps, profiling, kernels.
#include <acl/acl.h>
#include <time.h>

#include "error.h"

#define SIM_EXPORT __attribute__((visibility("default")))

namespace {

aclError no_kernels(const char* call) {
  return sim::fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: this device runs no compiled kernels",
                   call);
}

constexpr int kRuntimeRefuses = 207000;

}  // namespace

extern "C" {

aclError aclmdlInitDump() { return ACL_SUCCESS; }
aclError aclmdlSetDump(const char*) { return ACL_SUCCESS; }
aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }

aclError aclrtBinaryLoadFromData(const void*, size_t, const aclrtBinaryLoadOptions*,
                                 aclrtBinHandle*) {
  return no_kernels(__func__);
}
aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char*, aclrtFuncHandle*) {
  return no_kernels(__func__);
}
aclError aclrtGetFunctionAddr(aclrtFuncHandle, void**, void**) { return no_kernels(__func__); }

SIM_EXPORT int rtDevBinaryRegister(const void*, void**) { return kRuntimeRefuses; }
SIM_EXPORT int rtFunctionRegister(void*, const void*, const char*, const void*, uint32_t) {
  return kRuntimeRefuses;
}
SIM_EXPORT int rtKernelLaunch(const void*, uint32_t, void*, uint32_t, void*, void*) {
  return kRuntimeRefuses;
}
SIM_EXPORT int rtGetC2cCtrlAddr(uint64_t*, uint32_t*) { return kRuntimeRefuses; }

SIM_EXPORT int32_t MsprofRegisterCallback(uint32_t, void*) { return 0; }
SIM_EXPORT int32_t MsprofReportApi(uint32_t, const void*) { return 0; }
SIM_EXPORT int32_t MsprofReportCompactInfo(uint32_t, const void*, uint32_t) { return 0; }
SIM_EXPORT int32_t MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) { return 0; }
SIM_EXPORT uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
SIM_EXPORT uint64_t MsprofSysCycleTime() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

}  // extern "C"
