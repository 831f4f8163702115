// SPDX-License-Identifier: Apache-2.0
#include "state/page_locks.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>

#include "state/memory.h"

namespace sim {
namespace {

// Whether every page of the range is mlocked: each mapping in it has the flag "lo".
bool is_mlocked(const char* begin, const char* end) {
  std::ifstream mappings("/proc/self/smaps");
  auto next = reinterpret_cast<uintptr_t>(begin);
  const auto last = reinterpret_cast<uintptr_t>(end);
  uintptr_t first = 0;
  uintptr_t after = 0;
  for (std::string line; next < last && std::getline(mappings, line);) {
    unsigned long from;
    unsigned long to;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      first = from;
      after = to;
      if (first > next) return false;
    } else if (next >= first && next < after && line.rfind("VmFlags:", 0) == 0) {
      if (line.find(" lo") == std::string::npos) return false;
      next = after;
    }
  }
  return next >= last;
}

bool stays(const char* begin, const Registered& range) {
  if (!settings().kernel.at_least(kKernelThatKeepsMlocked)) return false;
  bool pinned_by_driver = range.is_mapped || settings().driver.at_least(kPinningDriver);
  return pinned_by_driver || is_mlocked(begin, begin + range.bytes);
}

}  // namespace

size_t locked_bytes(const void* begin, size_t bytes) {
  if (device::kRegisteringPins) return bytes;
  auto* first = static_cast<const char*>(begin);
  auto* at = first;
  std::lock_guard<std::mutex> lock(memory().mutex);
  while (at < first + bytes) {
    auto block = find_containing(memory().pinned, at);
    if (block != memory().pinned.end()) {
      at = block->first + block->second.bytes;
      continue;
    }
    auto entry = find_containing(memory().registered, at);
    if (entry == memory().registered.end()) break;
    auto& [start, range] = *entry;
    if (!range.is_locked) range.is_locked = stays(start, range);
    if (!*range.is_locked) break;
    at = start + range.bytes;
  }
  return std::min<size_t>(at - first, bytes);
}

}  // namespace sim
