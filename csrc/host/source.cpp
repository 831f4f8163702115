// SPDX-License-Identifier: Apache-2.0
#include "host/source.h"

#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "ascendcl/check.h"
#include "ascendcl/vmm.h"

namespace camem {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

constexpr int kCopies = 16;
constexpr int kAttempts = 5;  // a busy host may delay the thread until its copies are done

// What the copies are tried on.
struct Sample {
  explicit Sample(int device, std::size_t bytes)
      : host(HostMemory::page_locked(bytes, HostSource::kRegistered)),
        range(bytes),
        memory(device, bytes) {
    memory.map(range.base());
  }

  HostMemory host;
  Reservation range;
  PhysicalMemory memory;
};

// Empty: copies from and to registered memory are exact, and return before they are done.
std::string why_registered_copies_are_not_used(int device, CopyStream& stream) {
  const std::size_t unit = granularity(device);
  const std::size_t bytes = (4 * kMiB + unit - 1) / unit * unit;
  auto sample = std::make_unique<Sample>(device, bytes);
  std::byte* host = sample->host.data();
  std::byte* memory = sample->range.base();
  if (!sample->host.is_registered()) return last_locking_failure();
  std::vector<std::byte> pattern(bytes);
  for (std::size_t i = 0; i < bytes; ++i) pattern[i] = static_cast<std::byte>(i * 2654435761 >> 13);
  std::memcpy(host, pattern.data(), bytes);
  bool asynchronous = false;
  try {
    for (int attempt = 0; attempt < kAttempts && !asynchronous; ++attempt) {
      for (int i = 0; i < kCopies; ++i) {
        stream.copy(memory, host, bytes, ACL_MEMCPY_HOST_TO_DEVICE);
      }
      asynchronous = !stream.is_idle();
      stream.wait(bytes);
    }
    std::memset(host, 0, bytes);
    stream.copy(host, memory, bytes, ACL_MEMCPY_DEVICE_TO_HOST);
    stream.wait(bytes);
  } catch (...) {
    stream.drain();
    if (stream.is_stuck()) (void)sample.release();  // a copy may use it at any time to come
    throw;
  }
  if (std::memcmp(host, pattern.data(), bytes) != 0) {
    return "copies from and to registered memory are not exact";
  }
  return asynchronous ? "" : "copies from registered memory are not asynchronous";
}

}  // namespace

HostChoice try_registered_memory(int device, CopyStream* stream) {
  std::string why;
  try {
    if (stream == nullptr) {
      why = "the device has no stream left to try copies on";
    } else {
      why = why_registered_copies_are_not_used(device, *stream);
    }
  } catch (const std::exception& error) {
    why = std::string("registered memory could not be tried: ") + error.what();
  }
  if (!why.empty()) return {HostSource::kAcl, why};
  return {HostSource::kRegistered, "copies from and to it were tried: asynchronous and exact"};
}

}  // namespace camem
