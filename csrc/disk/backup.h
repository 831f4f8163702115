// SPDX-License-Identifier: Apache-2.0
//
// A chunk's backup in a file: its part of the file, and a checksum of each piece.
//
// The checksum is CRC-32C: the CPU computes it faster than a disk reads, and it finds every error
// burst of up to 32 bits and all but one in 2^32 of other damage, such as torn or stale blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "disk/file.h"

namespace camem {

class DiskBackup {
 public:
  // The unit of requests and of checksums.
  static constexpr std::size_t kPiece = std::size_t{8} << 20;

  DiskBackup() = default;
  DiskBackup(std::shared_ptr<DiskFile> file, std::size_t offset, std::size_t bytes);

  explicit operator bool() const { return file_ != nullptr; }
  const std::shared_ptr<DiskFile>& file() const { return file_; }

  // Writes or reads a piece. Thread-safe for different pieces. Throw DiskError; a read does so too
  // if the piece is not what was written.
  void write_piece(std::size_t piece, const std::byte* data);
  void read_piece(std::size_t piece, std::byte* data) const;
  std::size_t bytes_of(std::size_t piece) const;
  std::size_t pieces() const { return sums_.size(); }

  // Reads any part, verified like its pieces. Throws DiskError.
  void read(std::size_t offset, std::size_t bytes, std::byte* target) const;

  // Gives back the space.
  void release() noexcept;

 private:
  std::shared_ptr<DiskFile> file_;
  std::size_t offset_ = 0;
  std::size_t bytes_ = 0;
  std::vector<std::uint32_t> sums_;
};

// Memory for a piece that any disk accepts. Throws std::bad_alloc.
class PieceBuffer {
 public:
  PieceBuffer();
  ~PieceBuffer();
  PieceBuffer(const PieceBuffer&) = delete;
  PieceBuffer& operator=(const PieceBuffer&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
};

}  // namespace camem
