// SPDX-License-Identifier: Apache-2.0
#include "host_source.h"

#include <acl/acl.h>
#include <sys/utsname.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "acl_check.h"
#include "vmm.h"

namespace camem {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// Below it registered pages may still move or be swapped, locked by mlock or not.
constexpr int kKernelMajor = 5, kKernelMinor = 19;

// Empty: the running kernel keeps registered pages where they are.
std::string why_kernel_is_too_old() {
  utsname name{};
  int major = 0, minor = 0;
  if (uname(&name) != 0 || std::sscanf(name.release, "%d.%d", &major, &minor) != 2) {
    return "the kernel's version is not known";
  }
  if (major > kKernelMajor || (major == kKernelMajor && minor >= kKernelMinor)) return "";
  return std::string("Linux ") + name.release + " does not keep registered pages in place; " +
         std::to_string(kKernelMajor) + "." + std::to_string(kKernelMinor) + " does";
}

// A stream, and device memory to copy to and from.
class Scratch {
 public:
  Scratch(int device, std::size_t bytes) : range_(bytes), memory_(device, bytes) {
    memory_.map(range_.base());
    CAMEM_CHECK(aclrtCreateStream(&stream_), 0);
  }
  ~Scratch() { CAMEM_CHECK_NOEXCEPT(aclrtDestroyStream(stream_), 0); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void to_device(const std::byte* from, std::size_t bytes) {
    CAMEM_CHECK(
        aclrtMemcpyAsync(range_.base(), bytes, from, bytes, ACL_MEMCPY_HOST_TO_DEVICE, stream_),
        bytes);
  }
  void to_host(std::byte* to, std::size_t bytes) {
    CAMEM_CHECK(
        aclrtMemcpyAsync(to, bytes, range_.base(), bytes, ACL_MEMCPY_DEVICE_TO_HOST, stream_),
        bytes);
  }
  bool is_busy() {
    aclrtStreamStatus status = ACL_STREAM_STATUS_COMPLETE;
    CAMEM_CHECK(aclrtStreamQuery(stream_, &status), 0);
    return status == ACL_STREAM_STATUS_NOT_READY;
  }
  void finish() { CAMEM_CHECK(aclrtSynchronizeStream(stream_), 0); }

 private:
  Reservation range_;
  PhysicalMemory memory_;
  aclrtStream stream_ = nullptr;
};

// Empty: copies from and to registered memory are exact, and return before they are done.
std::string why_registered_copies_are_not_used(int device) {
  const std::size_t unit = granularity(device);
  const std::size_t bytes = (4 * kMiB + unit - 1) / unit * unit;
  constexpr int kCopies = 16;
  const HostMemory host = HostMemory::page_locked(bytes, HostSource::kRegistered);
  if (!host.is_registered()) return last_locking_failure();
  Scratch scratch(device, bytes);
  std::vector<std::byte> pattern(bytes);
  for (std::size_t i = 0; i < bytes; ++i) pattern[i] = static_cast<std::byte>(i * 2654435761 >> 13);
  std::memcpy(host.data(), pattern.data(), bytes);
  for (int i = 0; i < kCopies; ++i) scratch.to_device(host.data(), bytes);
  const bool asynchronous = scratch.is_busy();
  scratch.finish();
  std::memset(host.data(), 0, bytes);
  scratch.to_host(host.data(), bytes);
  scratch.finish();
  if (std::memcmp(host.data(), pattern.data(), bytes) != 0) {
    return "copies from and to registered memory are not exact";
  }
  return asynchronous ? "" : "copies from registered memory are not asynchronous";
}

}  // namespace

HostChoice choose_host_source(std::optional<HostSource> wanted, int device) {
  if (wanted == HostSource::kAcl) return {HostSource::kAcl, "host_memory says so"};
  std::string why = why_kernel_is_too_old();
  try {
    if (why.empty()) why = why_registered_copies_are_not_used(device);
  } catch (const std::exception& error) {
    why = std::string("registered memory could not be tried: ") + error.what();
  }
  if (!why.empty()) return {HostSource::kAcl, why};
  return {HostSource::kRegistered, "copies from and to it were tried: asynchronous and exact"};
}

}  // namespace camem
