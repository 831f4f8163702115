// SPDX-License-Identifier: Apache-2.0
#include "host/source.h"

#include <cstring>
#include <vector>

namespace camem {
namespace {

constexpr int kCopies = 16;
constexpr int kAttempts = 5;  // a busy host may delay the thread until its copies are done

}  // namespace

std::string why_registered_copies_are_not_used(std::byte* registered, std::byte* device,
                                               std::size_t bytes, CopyStream& stream) {
  std::vector<std::byte> pattern(bytes);
  for (std::size_t i = 0; i < bytes; ++i) pattern[i] = static_cast<std::byte>(i * 2654435761 >> 13);
  std::memcpy(registered, pattern.data(), bytes);
  bool asynchronous = false;
  try {
    for (int attempt = 0; attempt < kAttempts && !asynchronous; ++attempt) {
      for (int i = 0; i < kCopies; ++i) {
        stream.copy(device, registered, bytes, ACL_MEMCPY_HOST_TO_DEVICE);
      }
      asynchronous = stream.is_busy();
      stream.wait(bytes);
    }
    std::memset(registered, 0, bytes);
    stream.copy(registered, device, bytes, ACL_MEMCPY_DEVICE_TO_HOST);
    stream.wait(bytes);
  } catch (...) {
    stream.drain();
    throw;
  }
  if (std::memcmp(registered, pattern.data(), bytes) != 0) {
    return "copies from and to registered memory are not exact";
  }
  return asynchronous ? "" : "copies from registered memory are not asynchronous";
}

}  // namespace camem
