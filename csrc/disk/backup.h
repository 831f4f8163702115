// SPDX-License-Identifier: Apache-2.0
//
// A chunk's backup in a file: its part of the file, and a digest of each piece.
//
// The digest finds damage, such as torn or stale blocks, when a piece is read. It also tells that a
// piece in the file is equal to what would be written, which then is not: a checksum of 32 bits
// would be wrong once in 2^32 changes, and lose one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "disk/digest.h"
#include "disk/file.h"

namespace camem {

class DiskBackup {
 public:
  // The unit of requests and of digests.
  static constexpr std::size_t kPiece = kMostDigested;

  DiskBackup() = default;
  DiskBackup(std::shared_ptr<DiskFile> file, std::size_t offset, std::size_t bytes);

  explicit operator bool() const { return file_ != nullptr; }
  const std::shared_ptr<DiskFile>& file() const { return file_; }

  // Writes a piece, unless the file has it already, or reads it. Thread-safe for different pieces.
  // Throw DiskError; a read does so too if the piece is not what was written.
  void write_piece(std::size_t piece, const std::byte* data);
  void read_piece(std::size_t piece, std::byte* data) const;
  std::size_t bytes_of(std::size_t piece) const;
  std::size_t pieces() const { return pieces_.size(); }

  // Bytes that were written since the last call of either: what they hold counts from now on, or it
  // does not, because the disk may have lost it.
  std::size_t keep_written();
  void forget_written();

  // Reads any part, verified like its pieces. Throws DiskError.
  void read(std::size_t offset, std::size_t bytes, std::byte* target) const;

  // Gives back the space.
  void release() noexcept;

 private:
  struct Piece {
    std::optional<Digest> digest;  // empty if it is not known what the file has
    bool written = false;
  };

  std::shared_ptr<DiskFile> file_;
  std::size_t offset_ = 0;
  std::size_t bytes_ = 0;
  std::vector<Piece> pieces_;
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
