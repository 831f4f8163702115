// SPDX-License-Identifier: Apache-2.0
#include "host_pool.h"

#include <acl/acl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "acl_check.h"
#include "acl_optional.h"

namespace camem {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = 4096;

// Registering is not available, or no more can be registered: aclrtMallocHost may still work.
bool can_do_without_registering(aclError code) {
  constexpr aclError kNotSupported = 207000, kApiNotSupported = 200001, kNoResource = 207005;
  return code == kNotSupported || code == kApiNotSupported || code == kNoResource;
}

std::atomic<std::size_t> g_pinned_bytes{0};

[[noreturn]] void throw_out_of_host_memory(const std::string& what, std::size_t bytes) {
  const std::size_t available = available_host_bytes();
  throw OutOfHostMemory(what + ": " + std::to_string(bytes) + " bytes of host memory needed, " +
                            std::to_string(available) + " bytes available",
                        bytes, available);
}

void check_host(aclError code, const char* call, std::size_t bytes) {
  if (code == ACL_SUCCESS) return;
  if (is_out_of_memory(code)) {
    throw_out_of_host_memory(
        std::string(call) + " failed with " + std::to_string(code) + " (" + code_name(code) + ")",
        bytes);
  }
  throw AclError(call, code, bytes, recent_error_message());
}

void touch(std::byte* data, std::size_t bytes) {
  for (std::size_t offset = 0; offset < bytes; offset += kPage) {
    *const_cast<volatile std::byte*>(data + offset) = std::byte{0};
  }
}

std::size_t read_bytes(const std::string& path) {
  std::size_t value = std::numeric_limits<std::size_t>::max();
  std::ifstream(path) >> value;  // "max" and a missing file leave the limit as it is
  return value == 0 ? std::numeric_limits<std::size_t>::max() : value;
}

std::size_t field(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string key;
  std::size_t value = 0;
  while (file >> key) {
    if (key == name && file >> value) return value;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return 0;
}

// What one control group leaves to its processes; file pages that can be dropped count as free.
std::size_t cgroup_headroom(const std::string& directory, const char* limit, const char* usage,
                            const char* reclaimable) {
  std::ifstream probe(directory + limit);
  if (!probe) return std::numeric_limits<std::size_t>::max();
  std::string word;
  probe >> word;
  if (word == "max" || word.empty()) return std::numeric_limits<std::size_t>::max();
  const std::size_t allowed = std::stoull(word);
  std::size_t used = read_bytes(directory + usage);
  if (used == std::numeric_limits<std::size_t>::max()) return used;
  used -= std::min(used, field(directory + "memory.stat", reclaimable));
  return allowed > used ? allowed - used : 0;
}

}  // namespace

void throw_backup_does_not_fit(std::size_t needed, std::size_t available) {
  throw OutOfHostMemory("the backup needs " + std::to_string(needed) +
                            " bytes of host memory and " + std::to_string(available) +
                            " are available; free host memory, or use level 2, which keeps no "
                            "backup of the weights",
                        needed, available);
}

// Starts on a huge-page boundary. A forked child does not inherit it: a copy-on-write of a pinned
// page would leave the device writing to the wrong one.
HostSpace::HostSpace(std::size_t bytes) {
  if (bytes == 0) return;
  const std::size_t padded = bytes + kHugePage;
  void* raw = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw_out_of_host_memory("mmap failed", bytes);
  const auto start = reinterpret_cast<std::uintptr_t>(raw);
  const auto aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(raw, aligned - start);
  munmap(reinterpret_cast<void*>(aligned + bytes), start + padded - aligned - bytes);
  next_ = reinterpret_cast<std::byte*>(aligned);
  end_ = next_ + bytes;
  madvise(next_, bytes, MADV_HUGEPAGE);
  madvise(next_, bytes, MADV_DONTFORK);
}

HostSpace::~HostSpace() {
  if (next_ != end_) munmap(next_, static_cast<std::size_t>(end_ - next_));
}

std::byte* HostSpace::take(std::size_t bytes) {
  const std::size_t available = available_host_bytes();
  std::lock_guard<std::mutex> lock(mutex_);
  const auto left = static_cast<std::size_t>(end_ - next_);
  if (bytes > left) throw std::logic_error("more host memory taken than was mapped for it");
  // It was there when this began: others take it too, other engines of the host above all.
  if (available < left) throw_backup_does_not_fit(left, available);
  return std::exchange(next_, next_ + bytes);
}

HostMemory::HostMemory(std::size_t bytes)
    : HostMemory(bytes, *std::make_unique<HostSpace>(bytes)) {}

HostMemory::HostMemory(std::size_t bytes, HostSpace& space) : bytes_(bytes) {
  std::byte* data = space.take(bytes);
  touch(data, bytes);
  const aclError code = host_register(data, bytes);
  if (code == ACL_SUCCESS) {
    registered_ = true;
    data_ = data;
  } else {
    munmap(data, bytes);
    if (!can_do_without_registering(code)) check_host(code, "aclrtHostRegister", bytes);
    void* pinned = nullptr;
    check_host(aclrtMallocHost(&pinned, bytes), "aclrtMallocHost", bytes);
    data_ = static_cast<std::byte*>(pinned);
  }
  g_pinned_bytes += bytes;
}

HostMemory::~HostMemory() {
  try {
    release();
  } catch (const AclError& error) {
    check_noexcept(error.code(), error.call().c_str(), bytes_);  // stays mapped: it is still pinned
  }
}

HostMemory::HostMemory(HostMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      registered_(std::exchange(other.registered_, false)) {}

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(registered_, other.registered_);
  return *this;
}

void HostMemory::release() {
  if (data_ == nullptr) return;
  if (registered_) {
    check_host(host_unregister(data_), "aclrtHostUnregister", bytes_);
    munmap(data_, bytes_);
  } else {
    check_host(aclrtFreeHost(data_), "aclrtFreeHost", bytes_);
  }
  data_ = nullptr;
  g_pinned_bytes -= bytes_;
}

std::size_t available_host_bytes() {
  std::size_t available = field("/proc/meminfo", "MemAvailable:") * 1024;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    // hierarchy:controllers:path; version 2 names no controllers.
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && controllers != "memory") continue;
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    // The group of this process and those around it. In a container the path may be the host's,
    // which is not there; the root then is the container's group.
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      const std::string group = root + path + (path == "/" ? "" : "/");
      available = std::min(
          available, v2 ? cgroup_headroom(group, "memory.max", "memory.current", "inactive_file")
                        : cgroup_headroom(group, "memory.limit_in_bytes", "memory.usage_in_bytes",
                                          "total_inactive_file"));
      if (path.find('/') == std::string::npos) break;
    }
  }
  return available;
}

std::size_t pinned_host_bytes() { return g_pinned_bytes; }

}  // namespace camem
