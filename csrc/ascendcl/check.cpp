// SPDX-License-Identifier: Apache-2.0
#include "ascendcl/check.h"

#include <cstdio>
#include <cstring>
#include <sstream>

#include "ascendcl/codes.h"
#include "ascendcl/optional.h"

namespace camem {
namespace {

std::string call_name(const char* expression) {
  return std::string(expression, std::strcspn(expression, "("));
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

}  // namespace

AclError::AclError(std::string call, aclError code, std::size_t bytes, const std::string& detail)
    : std::runtime_error([&] {
        std::ostringstream text;
        text << call << " failed with " << code << " (" << code_name(code) << ")";
        if (bytes != 0) text << " for " << bytes << " bytes";
        if (!detail.empty()) text << ": " << detail;
        return text.str();
      }()),
      call_(std::move(call)),
      code_(code),
      bytes_(bytes) {}

std::size_t free_device_bytes() {
  std::size_t free = 0, total = 0;
  return aclrtGetMemInfo(ACL_HBM_MEM, &free, &total) == ACL_SUCCESS ? free : 0;
}

void check(aclError code, const char* expression, std::size_t bytes, const char* file, int line) {
  if (code == ACL_SUCCESS) return;
  std::string call = call_name(expression);
  std::ostringstream detail;
  const std::string reason = recent_error_message();
  if (!reason.empty()) detail << reason << " ";
  detail << "[" << base_name(file) << ":" << line << "]";
  if (is_out_of_memory(code)) {
    const std::size_t free = free_device_bytes();
    std::ostringstream text;
    text << call << " failed with " << code << " (" << code_name(code) << "): " << bytes
         << " bytes needed, " << free << " bytes free on the device; " << detail.str();
    throw OutOfDeviceMemory(text.str(), bytes, free);
  }
  throw AclError(std::move(call), code, bytes, detail.str());
}

void check_noexcept(aclError code, const char* expression, std::size_t bytes) noexcept {
  if (code == ACL_SUCCESS) return;
  std::fprintf(stderr, "vllm_sleep_ascend: %.*s failed with %d (%s) for %zu bytes\n",
               static_cast<int>(std::strcspn(expression, "(")), expression, code, code_name(code),
               bytes);
}

}  // namespace camem
