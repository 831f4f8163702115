// SPDX-License-Identifier: Apache-2.0
#include "disk/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace camem {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // reflected
constexpr std::size_t kWord = sizeof(std::uint64_t);

// Table k has the checksum of each byte with k zero bytes behind it.
using Tables = std::array<std::array<std::uint32_t, 256>, kWord>;

Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ ((sum & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = sum;
  }
  for (std::size_t k = 1; k < kWord; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t shorter = tables[k - 1][byte];
      tables[k][byte] = (shorter >> 8) ^ tables[0][shorter & 0xff];
    }
  }
  return tables;
}

std::uint64_t word_at(const std::byte* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, kWord);
  return word;
}

std::uint32_t by_tables(std::uint32_t sum, const std::byte* data, std::size_t bytes) {
  static const Tables tables = make_tables();
  for (; bytes >= kWord; data += kWord, bytes -= kWord) {
    const std::uint64_t word = word_at(data) ^ sum;
    sum = 0;
    for (std::size_t k = 0; k < kWord; ++k) {
      sum ^= tables[kWord - 1 - k][(word >> (8 * k)) & 0xff];
    }
  }
  for (; bytes > 0; ++data, --bytes) {
    sum = (sum >> 8) ^ tables[0][(sum ^ static_cast<std::uint32_t>(*data)) & 0xff];
  }
  return sum;
}

#if defined(__x86_64__)

bool has_instruction() { return __builtin_cpu_supports("sse4.2") != 0; }

__attribute__((target("sse4.2"))) std::uint32_t by_instruction(std::uint32_t sum,
                                                               const std::byte*& data,
                                                               std::size_t& bytes) {
  std::uint64_t wide = sum;
  for (; bytes >= kWord; data += kWord, bytes -= kWord) wide = _mm_crc32_u64(wide, word_at(data));
  return static_cast<std::uint32_t>(wide);
}

#elif defined(__aarch64__)

bool has_instruction() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

__attribute__((target("+crc"))) std::uint32_t by_instruction(std::uint32_t sum,
                                                             const std::byte*& data,
                                                             std::size_t& bytes) {
  for (; bytes >= kWord; data += kWord, bytes -= kWord) {
    sum = __crc32cd(sum, word_at(data));
  }
  return sum;
}

#else

bool has_instruction() { return false; }

std::uint32_t by_instruction(std::uint32_t sum, const std::byte*&, std::size_t&) { return sum; }

#endif

}  // namespace

std::uint32_t crc32c_portable(const std::byte* data, std::size_t bytes) {
  return ~by_tables(~std::uint32_t{0}, data, bytes);
}

std::uint32_t crc32c(const std::byte* data, std::size_t bytes) {
  static const bool instruction = has_instruction();
  std::uint32_t sum = ~std::uint32_t{0};
  if (instruction) sum = by_instruction(sum, data, bytes);
  return ~by_tables(sum, data, bytes);
}

}  // namespace camem
