// SPDX-License-Identifier: Apache-2.0
#include "host/memory.h"

#include <acl/acl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "ascendcl/check.h"
#include "ascendcl/codes.h"
#include "ascendcl/optional.h"

namespace camem {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::atomic<std::size_t> g_page_locked{0};
std::atomic<std::size_t> g_plain{0};
std::mutex g_failure_mutex;
std::string g_failure;
std::string g_registering_failure;

[[noreturn]] void throw_out_of_host_memory(const std::string& what, std::size_t bytes) {
  const std::size_t available = available_host_bytes();
  throw OutOfHostMemory(what + ": " + std::to_string(bytes) + " bytes of host memory needed, " +
                            std::to_string(available) + " bytes available",
                        bytes, available);
}

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void touch(std::byte* data, std::size_t bytes) {
  for (std::size_t offset = 0; offset < bytes; offset += page_bytes()) {
    *const_cast<volatile std::byte*>(data + offset) = std::byte{0};
  }
}

void note_failure(const std::string& what) {
  std::lock_guard<std::mutex> lock(g_failure_mutex);
  g_failure = what;
}

// Registering alone locks no page: the runtime only records the range and makes later copies
// asynchronous, even if the pages have moved by then.
bool lock_and_register(std::byte* data, std::size_t bytes) {
  touch(data, bytes);
  std::string failure;
  if (mlock(data, bytes) != 0) {
    failure = std::string("mlock: ") + std::strerror(errno) + "; raise ulimit -l";
  } else {
    const aclError code = host_register(data, bytes);
    if (code == ACL_SUCCESS) return true;
    failure =
        "aclrtHostRegisterV2 failed with " + std::to_string(code) + " (" + code_name(code) + ")";
  }
  std::lock_guard<std::mutex> lock(g_failure_mutex);
  g_failure = g_registering_failure = failure;
  return false;
}

std::size_t read_bytes(const std::string& path) {
  std::size_t value = std::numeric_limits<std::size_t>::max();
  std::ifstream(path) >> value;  // unchanged if the file is missing or says "max"
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

// What a control group leaves to its processes. Reclaimable file pages count as free.
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

void throw_backup_does_not_fit(std::size_t needed, std::size_t available, bool moves) {
  const char* otherwise =
      moves ? "leave the backup on disk" : "use level 2, which keeps no backup of the weights";
  throw OutOfHostMemory("the backup needs " + std::to_string(needed) +
                            " bytes of host memory and " + std::to_string(available) +
                            " are available; free host memory, or " + otherwise,
                        needed, available);
}

HostSpace::~HostSpace() {
  if (next_ != end_) munmap(next_, static_cast<std::size_t>(end_ - next_));
}

void HostSpace::claim(std::size_t bytes) {
  const std::size_t available = available_host_bytes();
  std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > unclaimed_) throw std::logic_error("more host memory taken than was asked for");
  // It was available at the start, so other processes (usually other engines) have taken it since.
  if (available < unclaimed_) throw_backup_does_not_fit(unclaimed_, available);
  unclaimed_ -= bytes;
}

// Aligned to huge pages. A forked child does not inherit it: after a copy-on-write of a locked
// page, the device would write to the wrong page.
std::byte* HostSpace::map(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (next_ == nullptr) {
    const std::size_t padded = bytes_ + kHugePage;
    void* raw = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw_out_of_host_memory("mmap failed", bytes_);
    const auto start = reinterpret_cast<std::uintptr_t>(raw);
    const auto aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > start) munmap(raw, aligned - start);
    munmap(reinterpret_cast<void*>(aligned + bytes_), start + padded - aligned - bytes_);
    next_ = reinterpret_cast<std::byte*>(aligned);
    end_ = next_ + bytes_;
    madvise(next_, bytes_, MADV_HUGEPAGE);
    madvise(next_, bytes_, MADV_DONTFORK);
  }
  if (bytes > static_cast<std::size_t>(end_ - next_)) {
    throw std::logic_error("more host memory mapped than was asked for");
  }
  return std::exchange(next_, next_ + bytes);
}

HostMemory::HostMemory(std::byte* data, std::size_t bytes, Kind kind)
    : data_(data), bytes_(bytes), kind_(kind) {
  (is_page_locked() ? g_page_locked : g_plain) += bytes;
}

HostMemory HostMemory::page_locked(std::size_t bytes, HostSource source) {
  HostSpace space(bytes);
  return page_locked(bytes, source, space);
}

HostMemory HostMemory::page_locked(std::size_t bytes, HostSource source, HostSpace& space) {
  space.claim(bytes);
  if (source == HostSource::kRegistered) {
    HostMemory block = map_and_register(bytes, space);
    if (block.is_page_locked()) return block;
  }
  return allocate(bytes);
}

HostMemory HostMemory::plain(std::size_t bytes, HostSpace& space) {
  space.claim(bytes);
  return {space.map(bytes), bytes, Kind::kPlain};
}

// A claim is mapped only once, so a block that could not be registered is used as the plain block.
HostMemory HostMemory::any(std::size_t bytes, HostSource source, HostSpace& space) {
  space.claim(bytes);
  HostMemory block;
  if (source == HostSource::kRegistered) {
    block = map_and_register(bytes, space);
    if (block.is_page_locked()) return block;
  }
  if (!space.without_locking) {
    try {
      return allocate(bytes);
    } catch (const AclError&) {
    } catch (const OutOfHostMemory&) {
    }
    space.without_locking = true;
  }
  return block ? std::move(block) : HostMemory(space.map(bytes), bytes, Kind::kPlain);
}

HostMemory HostMemory::allocate(std::size_t bytes) {
  void* data = nullptr;
  const aclError code = aclrtMallocHost(&data, bytes);
  if (code == ACL_SUCCESS) return {static_cast<std::byte*>(data), bytes, Kind::kAcl};
  const std::string failure =
      "aclrtMallocHost failed with " + std::to_string(code) + " (" + code_name(code) + ")";
  note_failure(failure);
  if (is_out_of_memory(code)) throw_out_of_host_memory(failure, bytes);
  throw AclError("aclrtMallocHost", code, bytes, recent_error_message());
}

// Plain if it could not be locked or registered, empty if not even mapped. After one that could not
// the others are not tried: to touch their pages first is what takes the time.
HostMemory HostMemory::map_and_register(std::size_t bytes, HostSpace& space) {
  if (!registering_failure().empty()) return {};
  std::byte* data = nullptr;
  try {
    data = space.map(bytes);
  } catch (const OutOfHostMemory& error) {
    note_failure(error.what());
    return {};
  }
  if (lock_and_register(data, bytes)) return {data, bytes, Kind::kRegistered};
  munlock(data, bytes);
  return {data, bytes, Kind::kPlain};
}

// Retries a failing call once, because nothing retries later.
HostMemory::~HostMemory() {
  for (int attempt = 0; attempt < 2 && data_ != nullptr; ++attempt) {
    try {
      release();
    } catch (const std::exception& error) {
      if (attempt == 0) continue;
      std::fprintf(stderr, "vllm_sleep_ascend: %zu bytes of host memory stay taken: %s\n", bytes_,
                   error.what());
    }
  }
}

HostMemory::HostMemory(HostMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      kind_(other.kind_) {}

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(kind_, other.kind_);
  return *this;
}

void HostMemory::release() {
  if (data_ == nullptr) return;
  switch (kind_) {
    case Kind::kAcl:
      CAMEM_CHECK(aclrtFreeHost(data_), bytes_);
      break;
    case Kind::kRegistered:
      check(host_unregister(data_), "aclrtHostUnregister", bytes_, __FILE__, __LINE__);
      [[fallthrough]];
    case Kind::kPlain:
      munmap(data_, bytes_);
  }
  (is_page_locked() ? g_page_locked : g_plain) -= bytes_;
  data_ = nullptr;
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
    // This process's group and its ancestors. In a container the path may be the host's and not
    // exist; the root is the container's group then.
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

std::size_t page_locked_host_bytes() { return g_page_locked; }
std::size_t plain_host_bytes() { return g_plain; }

std::string last_locking_failure() {
  std::lock_guard<std::mutex> lock(g_failure_mutex);
  return g_failure;
}

std::string registering_failure() {
  std::lock_guard<std::mutex> lock(g_failure_mutex);
  return g_registering_failure;
}

void forget_registering_failure() {
  std::lock_guard<std::mutex> lock(g_failure_mutex);
  g_registering_failure.clear();
}

}  // namespace camem
