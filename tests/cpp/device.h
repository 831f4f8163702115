// SPDX-License-Identifier: Apache-2.0
//
// The simulated device for the tests: counters, faults, content.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sim/control.h"

namespace device {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr aclError kDriverError = 507899;
constexpr aclError kOutOfMemory = 207001;
constexpr aclError kNotSupported = 207000;

// What this process holds of the devices and of pinned host memory. Streams and events are left
// out, because the core keeps its own for the life of the process.
struct Held {
  std::uint64_t device_bytes, handles, mappings, reservations, pinned_bytes, registered_bytes;

  std::uint64_t host_bytes() const { return pinned_bytes + registered_bytes; }
};

Held held();
bool operator==(const Held& left, const Held& right);
std::ostream& operator<<(std::ostream& out, const Held& held);

// While it lives, calls fail by rules as in NPU_SIM_FAULTS.
class Faults {
 public:
  explicit Faults(const std::string& rules);
  ~Faults();
  std::uint64_t hits() const { return npuSimFaultHits(); }
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;
};

// While it lives, it collects the names of all AscendCL calls.
class CallLog {
 public:
  CallLog() { npuSimKeepCallLog(1); }
  ~CallLog() { npuSimKeepCallLog(0); }
  CallLog(const CallLog&) = delete;
  CallLog& operator=(const CallLog&) = delete;

  std::vector<std::string> calls() const;
};

// A rule for every call of the log, which fails only that call: "name:nth:code".
std::vector<std::string> single_faults(const std::vector<std::string>& calls, aclError code);

int current();  // this thread's device, or -1
std::size_t free_bytes(int device);

// Content that is determined by a seed.
void write(void* address, std::size_t bytes, std::uint64_t seed);
bool holds(const void* address, std::size_t bytes, std::uint64_t seed);

}  // namespace device
