// SPDX-License-Identifier: Apache-2.0
#include "disk/digest.h"

#include <sys/random.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <vector>

namespace camem {
namespace {

constexpr std::size_t kWord = sizeof(std::uint64_t);
constexpr std::size_t kPair = 2 * kWord;

__extension__ using Wide = unsigned __int128;
using Key = std::vector<std::uint64_t>;

Key draw_key() {
  Key key(kMostDigested / kWord + 2);
  auto* bytes = reinterpret_cast<std::byte*>(key.data());
  for (std::size_t done = 0; done < key.size() * kWord;) {
    const ssize_t count = getrandom(bytes + done, key.size() * kWord - done, 0);
    if (count < 0 && errno != EINTR) {
      throw std::system_error(errno, std::generic_category(), "no random key for digests");
    }
    if (count > 0) done += static_cast<std::size_t>(count);
  }
  return key;
}

struct Sums {
  Wide first = 0, second = 0;

  void add(const std::byte* data, const std::uint64_t* key) {
    std::uint64_t words[2];
    std::memcpy(words, data, kPair);
    first += static_cast<Wide>(words[0] + key[0]) * (words[1] + key[1]);
    second += static_cast<Wide>(words[0] + key[2]) * (words[1] + key[3]);
  }
};

}  // namespace

Digest digest(const std::byte* data, std::size_t bytes) {
  if (bytes > kMostDigested) throw std::length_error("more than a digest takes");
  static const Key drawn = draw_key();
  const std::uint64_t* key = drawn.data();
  Sums sums;
  for (; bytes >= kPair; data += kPair, bytes -= kPair, key += 2) sums.add(data, key);
  if (bytes > 0) {
    std::array<std::byte, kPair> last{};
    std::memcpy(last.data(), data, bytes);
    sums.add(last.data(), key);
  }
  const auto high = [](Wide sum) { return static_cast<std::uint64_t>(sum >> 64); };
  const auto low = [](Wide sum) { return static_cast<std::uint64_t>(sum); };
  return {high(sums.first), low(sums.first), high(sums.second), low(sums.second)};
}

}  // namespace camem
