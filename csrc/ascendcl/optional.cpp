// SPDX-License-Identifier: Apache-2.0
#include "ascendcl/optional.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include "ascendcl/contexts.h"
#include "ascendcl/newer.h"

namespace camem {
namespace {

constexpr aclError kNotSupported = 207000;

template <typename Function>
Function lookup(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

using RecentErrMsg = const char* (*)();

}  // namespace

aclError host_register(void* address, std::size_t bytes) {
  static const auto register_v2 = lookup<HostRegisterV2>("aclrtHostRegisterV2");
  return register_v2 == nullptr ? kNotSupported : register_v2(address, bytes, kHostRegisterPinned);
}

aclError host_unregister(void* address) {
  static const auto unregister = lookup<HostUnregister>("aclrtHostUnregister");
  return unregister == nullptr ? kNotSupported : unregister(address);
}

std::optional<std::size_t> available_streams() {
  static const auto available = lookup<GetStreamAvailableNum>("aclrtGetStreamAvailableNum");
  uint32_t count = 0;
  if (available == nullptr || available(&count) != ACL_SUCCESS) return std::nullopt;
  return count;
}

bool is_capturing(aclrtStream stream) {
  static const auto info = lookup<CaptureGetInfo>("aclmdlRICaptureGetInfo");
  int32_t status = 0;  // none
  void* graph = nullptr;
  return info != nullptr && info(stream, &status, &graph) == ACL_SUCCESS && status != 0;
}

std::optional<std::unordered_map<std::string, std::size_t>> component_bytes(int device) {
  constexpr std::size_t kRoom = 128;
  static const auto usage = lookup<GetMemUsageInfo>("aclrtGetMemUsageInfo");
  if (usage == nullptr) return std::nullopt;
  std::vector<MemUsageInfo> components(kRoom);
  std::size_t count = 0;
  try {
    const DeviceGuard guard(device);  // the call needs a context
    if (usage(device, components.data(), kRoom, &count) != ACL_SUCCESS) return std::nullopt;
  } catch (const std::exception&) {
    return std::nullopt;
  }
  std::unordered_map<std::string, std::size_t> bytes;
  for (std::size_t i = 0; i < std::min(count, kRoom); ++i) {
    const char* name = components[i].name;
    bytes[std::string(name, strnlen(name, sizeof(components[i].name)))] += components[i].current;
  }
  return bytes;
}

std::string recent_error_message() {
  static const auto message = lookup<RecentErrMsg>("aclGetRecentErrMsg");
  const char* text = message == nullptr ? nullptr : message();
  return text == nullptr ? std::string() : std::string(text);
}

}  // namespace camem
