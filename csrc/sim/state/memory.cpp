// SPDX-License-Identifier: Apache-2.0
#include "state/memory.h"

#include "state/machine.h"

namespace sim {
namespace {

template <typename Map>
bool covers(Map& ranges, const void* begin, size_t bytes) {
  auto* first = static_cast<const char*>(begin);
  auto* end = first + bytes;
  auto entry = find_containing(ranges, first);
  while (entry != ranges.end() && first >= entry->first) {
    first = entry->first + entry->second.bytes;
    if (first >= end) return true;
    ++entry;
  }
  return false;
}

}  // namespace

Physical::~Physical() {
  device::destroy_physical(memory);
  if (!imported) machine::give(device, bytes);
}

std::shared_ptr<Physical> make_physical(int device, size_t bytes) {
  if (!machine::take(device, bytes)) return nullptr;
  device::Physical* memory = device::create_physical(device, bytes);
  if (memory == nullptr) {
    machine::give(device, bytes);
    return nullptr;
  }
  auto physical = std::make_shared<Physical>();
  physical->device = device;
  physical->bytes = bytes;
  physical->memory = memory;
  return physical;
}

Memory& memory() {
  static Memory* once = new Memory;
  return *once;
}

size_t taken_by_libraries(int device) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  size_t bytes = 0;
  for (const auto& [address, reservation] : memory().reservations) {
    if (!reservation.of_a_library) continue;
    const Physical& physical = *memory().mappings[address].physical;
    if (physical.device == device) bytes += physical.bytes;
  }
  return bytes;
}

Handles<Physical>& physicals() {
  static auto* once = new Handles<Physical>(0x54);
  return *once;
}

bool is_device_range(const void* begin, size_t bytes, int* device) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  if (!covers(memory().mappings, begin, bytes)) return false;
  if (device != nullptr) {
    *device = find_containing(memory().mappings, begin)->second.physical->device;
  }
  return true;
}

bool touches_device(const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return overlaps(memory().reservations, begin, bytes);
}

bool is_known_host(const void* address) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return overlaps(memory().pinned, address, 1) || overlaps(memory().registered, address, 1);
}

}  // namespace sim
