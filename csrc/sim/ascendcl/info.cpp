// SPDX-License-Identifier: Apache-2.0
//
// Information about the device, and settings without effect here.
#include <acl/acl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "error.h"
#include "faults.h"
#include "settings.h"
#include "state/context.h"
#include "state/machine.h"
#include "state/memory.h"

namespace {

constexpr int64_t kCubeCores = 24;
constexpr int64_t kVectorCores = 48;
constexpr int64_t kL2Bytes = 192 << 20;

}  // namespace

extern "C" {

const char* aclrtGetSocName() { return sim::settings().chip.soc_name; }

aclError aclrtGetRunMode(aclrtRunMode* mode) {
  *mode = ACL_HOST;
  return ACL_SUCCESS;
}

aclError aclrtGetVersion(int32_t* major, int32_t* minor, int32_t* patch) {
  *major = ACL_MAJOR_VERSION;
  *minor = ACL_MINOR_VERSION;
  *patch = ACL_PATCH_VERSION;
  return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  if (version == nullptr) return ACL_ERROR_INVALID_PARAM;
  *version = {};
  std::strcpy(version->version, SIM_CANN_VERSION);
  std::sscanf(SIM_CANN_VERSION, "%63[^.].%63[^.].%63s", version->majorVersion,
              version->minorVersion, version->releaseVersion);
  return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, SIM_CANN_VERSION);
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  switch (info) {
    case ACL_DEVICE_INFO_AI_CORE_NUM:
      *value = kCubeCores;
      return ACL_SUCCESS;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM:
      *value = kVectorCores;
      return ACL_SUCCESS;
    case ACL_DEVICE_INFO_L2_SIZE:
      *value = kL2Bytes;
      return ACL_SUCCESS;
    default:
      return ACL_ERROR_INVALID_PARAM;
  }
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  switch (static_cast<int>(attribute)) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM:
      *value = 6;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      *value = kCubeCores;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      *value = kVectorCores;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      *value = static_cast<int64_t>(sim::settings().hbm_bytes);
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      *value = kL2Bytes;
      return ACL_SUCCESS;
    default:
      *value = 0;
      return ACL_SUCCESS;
  }
}

aclError aclrtDeviceGetUuid(int32_t index, aclrtUuid* uuid) {
  SIM_REQUIRE(index >= 0 && index < static_cast<int32_t>(sim::settings().visible.size()),
              ACL_ERROR_RT_INVALID_DEVICEID, "%s: there is no device %d", __func__, index);
  std::memset(uuid, 0, sizeof(*uuid));
  std::snprintf(uuid->bytes, sizeof(uuid->bytes), "npu-sim-%d", sim::settings().visible[index]);
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  *value = attribute == ACL_CANN_ATTR_JIT_COMPILE ? 0 : 1;
  return ACL_SUCCESS;
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static const aclCannAttr available[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16};
  *list = available;
  *count = sizeof(available) / sizeof(available[0]);
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* info) {
  *info = {};
  return ACL_SUCCESS;
}

aclError aclrtGetMemUsageInfo(int32_t index, aclrtMemUsageInfo* info, size_t room, size_t* count) {
  SIM_CALL();
  SIM_REQUIRE(info != nullptr && count != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null result",
              __func__);
  *count = 0;
  SIM_REQUIRE(room > 0, ACL_ERROR_RT_PARAM_INVALID, "%s: no room for a component", __func__);
  SIM_REQUIRE(index >= 0 && index < static_cast<int32_t>(sim::settings().visible.size()),
              ACL_ERROR_RT_INVALID_DEVICEID, "%s: there is no device %d", __func__, index);
  SIM_CONTEXT(context);
  (void)context;
  const int physical = sim::settings().visible[index];
  const size_t libraries = sim::taken_by_libraries(physical);
  std::vector<std::pair<size_t, const char*>> components = {
      {sim::machine::taken_by_this_process(physical) - libraries, "APP"}, {libraries, "HCCL"}};
  std::sort(components.rbegin(), components.rend());
  *count = std::min(room, components.size());
  for (size_t i = 0; i < *count; ++i) {
    info[i] = {};
    std::strcpy(info[i].name, components[i].second);
    info[i].curMemSize = components[i].first;
    info[i].memPeakSize = components[i].first;
  }
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t* const logic) {
  SIM_REQUIRE(user >= 0 && user < static_cast<int32_t>(sim::settings().visible.size()),
              ACL_ERROR_RT_INVALID_DEVICEID, "%s: there is no device %d", __func__, user);
  *logic = sim::settings().visible[user];
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
aclError aclrtDeviceDisablePeerAccess(int32_t) { return ACL_SUCCESS; }

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtGetDeviceSatMode(aclrtFloatOverflowMode* mode) {
  *mode = ACL_RT_OVERFLOW_MODE_INFNAN;
  return ACL_SUCCESS;
}
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) {
  return ACL_SUCCESS;
}
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}

void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

}  // extern "C"
