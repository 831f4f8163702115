// SPDX-License-Identifier: Apache-2.0
//
// This process's device and host memory: reservations, mappings, pinned and registered ranges.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "device.h"
#include "handles.h"

namespace sim {

// Physical memory of an aclrtMallocPhysical handle or of an aclrtMalloc.
struct Physical {
  int device;  // of the machine
  size_t bytes;
  device::Physical* memory;
  bool imported = false;         // counted by the process that created it
  const char* mapped = nullptr;  // where it is mapped

  ~Physical();
};

// Allocates the bytes from the machine; null if there are not enough.
std::shared_ptr<Physical> make_physical(int device, size_t bytes);

struct Mapping {
  size_t bytes;
  std::shared_ptr<Physical> physical;
};

struct Reservation {
  size_t bytes;
  bool is_malloc = false;          // belongs to an aclrtMalloc, which maps all of it
  bool of_a_library = false;       // used by a simulated library itself
  std::optional<int> device = {};  // the device whose memory was mapped first
};

struct Pinned {  // of aclrtMallocHost
  size_t bytes;
};

struct Registered {  // of aclrtHostRegister
  size_t bytes;
  bool is_mapped;                 // for the device
  std::optional<bool> is_locked;  // set by the first copy
};

struct Memory {
  std::mutex mutex;
  std::map<const char*, Reservation> reservations;
  std::map<const char*, Mapping> mappings;
  std::map<const char*, Pinned> pinned;
  std::map<const char*, Registered> registered;
};

Memory& memory();

// Bytes of a device that the simulated libraries of this process use themselves.
size_t taken_by_libraries(int device);

Handles<Physical>& physicals();

// True if every byte of the range is mapped device memory. `device` gets the device of its start.
bool is_device_range(const void* begin, size_t bytes, int* device = nullptr);
bool touches_device(const void* begin, size_t bytes);
bool is_known_host(const void* address);  // pinned or registered

// The entry of an ordered map of ranges that contains the address, or end().
template <typename Map>
typename Map::iterator find_containing(Map& ranges, const void* address) {
  auto* wanted = static_cast<const char*>(address);
  auto next = ranges.upper_bound(wanted);
  if (next == ranges.begin()) return ranges.end();
  auto entry = std::prev(next);
  return wanted < entry->first + entry->second.bytes ? entry : ranges.end();
}

template <typename Map>
bool overlaps(Map& ranges, const void* begin, size_t bytes) {
  auto* first = static_cast<const char*>(begin);
  if (find_containing(ranges, first) != ranges.end()) return true;
  auto next = ranges.lower_bound(first);
  return next != ranges.end() && next->first < first + bytes;
}

}  // namespace sim
