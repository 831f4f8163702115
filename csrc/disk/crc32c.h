// SPDX-License-Identifier: Apache-2.0
//
// CRC-32C (Castagnoli), by the instruction of x86-64 and AArch64 where the CPU has it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace camem {

std::uint32_t crc32c(const std::byte* data, std::size_t bytes);

// By tables, on any CPU.
std::uint32_t crc32c_portable(const std::byte* data, std::size_t bytes);

}  // namespace camem
