// SPDX-License-Identifier: Apache-2.0
//
// A digest that tells whether two contents of the same size are equal.
//
// It is NH, the universal hash of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway 1999), over words
// of 64 bits, with a key as long as the content that a process draws at random. Two contents that
// differ have the same 128-bit sum with a probability of at most 2^-64, whatever they are, as long
// as they do not depend on the key, which never leaves the process. The second sum, with the key
// moved by two words (Toeplitz), makes that 2^-128.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace camem {

using Digest = std::array<std::uint64_t, 4>;

constexpr std::size_t kMostDigested = std::size_t{8} << 20;

// Of at most kMostDigested bytes. Throws std::system_error if the kernel has no random key.
Digest digest(const std::byte* data, std::size_t bytes);

}  // namespace camem
