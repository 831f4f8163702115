// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <acl/acl.h>

#include <map>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace device {
namespace {

auto as_tuple(const Held& held) {
  return std::tie(held.device_bytes, held.handles, held.mappings, held.reservations,
                  held.pinned_bytes, held.registered_bytes);
}

std::vector<std::uint64_t> content(std::size_t bytes, std::uint64_t seed) {
  std::vector<std::uint64_t> words(bytes / sizeof(std::uint64_t));
  std::uint64_t word = seed * 0x9e3779b97f4a7c15;
  for (std::uint64_t& each : words) each = word += 0xbf58476d1ce4e5b9;
  return words;
}

void copy(void* to, const void* from, std::size_t bytes, aclrtMemcpyKind kind) {
  const aclError code = aclrtMemcpy(to, bytes, from, bytes, kind);
  if (code != ACL_SUCCESS) throw std::logic_error("aclrtMemcpy: " + std::to_string(code));
}

}  // namespace

Held held() {
  npuSimCounters counters;
  npuSimGetCounters(&counters);
  return {counters.deviceBytes,  counters.physicalHandles, counters.mappings,
          counters.reservations, counters.pinnedBytes,     counters.registeredBytes};
}

bool operator==(const Held& left, const Held& right) { return as_tuple(left) == as_tuple(right); }

std::ostream& operator<<(std::ostream& out, const Held& held) {
  return out << "{" << held.device_bytes << " device bytes, " << held.handles << " handles, "
             << held.mappings << " mappings, " << held.reservations << " reservations, "
             << held.pinned_bytes << " pinned bytes, " << held.registered_bytes
             << " registered bytes}";
}

Faults::Faults(const std::string& rules) {
  if (npuSimSetFaults(rules.c_str()) != 0) throw std::logic_error("no such fault: " + rules);
}

Faults::~Faults() { npuSimSetFaults(""); }

std::vector<std::string> CallLog::calls() const {
  std::string log(npuSimCallLog(nullptr, 0) + 1, '\0');
  npuSimCallLog(log.data(), log.size());
  std::istringstream lines(log.c_str());
  std::vector<std::string> calls;
  for (std::string line; std::getline(lines, line);) calls.push_back(line);
  return calls;
}

std::vector<std::string> single_faults(const std::vector<std::string>& calls, aclError code) {
  std::map<std::string, int> seen;
  std::vector<std::string> rules;
  for (const std::string& call : calls) {
    rules.push_back(call + ":" + std::to_string(++seen[call]) + ":" + std::to_string(code));
  }
  return rules;
}

int current() {
  int32_t device = -1;
  return aclrtGetDevice(&device) == ACL_SUCCESS ? device : -1;
}

std::size_t free_bytes(int device) {
  const int before = current();
  aclrtSetDevice(device);
  std::size_t free = 0, total = 0;
  aclrtGetMemInfo(ACL_HBM_MEM, &free, &total);
  if (before >= 0) aclrtSetDevice(before);
  return free;
}

void write(void* address, std::size_t bytes, std::uint64_t seed) {
  copy(address, content(bytes, seed).data(), bytes, ACL_MEMCPY_HOST_TO_DEVICE);
}

bool holds(const void* address, std::size_t bytes, std::uint64_t seed) {
  std::vector<std::uint64_t> words(bytes / sizeof(std::uint64_t));
  copy(words.data(), address, bytes, ACL_MEMCPY_DEVICE_TO_HOST);
  return words == content(bytes, seed);
}

}  // namespace device
