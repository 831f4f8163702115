// SPDX-License-Identifier: Apache-2.0
#include "disk/backup.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace camem {
namespace {

constexpr std::size_t kPage = 4096;  // at least the logical block of any disk

}  // namespace

PieceBuffer::PieceBuffer()
    : data_(static_cast<std::byte*>(std::aligned_alloc(kPage, DiskBackup::kPiece))) {
  if (data_ == nullptr) throw std::bad_alloc();
}

PieceBuffer::~PieceBuffer() { std::free(data_); }

DiskBackup::DiskBackup(std::shared_ptr<DiskFile> file, std::size_t offset, std::size_t bytes)
    : file_(std::move(file)),
      offset_(offset),
      bytes_(bytes),
      pieces_((bytes + kPiece - 1) / kPiece) {}

std::size_t DiskBackup::bytes_of(std::size_t piece) const {
  return std::min(kPiece, bytes_ - piece * kPiece);
}

void DiskBackup::write_piece(std::size_t piece, const std::byte* data) {
  const std::size_t bytes = bytes_of(piece);
  const Digest now = digest(data, bytes);
  Piece& known = pieces_[piece];
  if (known.digest == now) return;
  known = {std::nullopt, true};
  file_->write(data, bytes, offset_ + piece * kPiece);
  known.digest = now;
}

void DiskBackup::read_piece(std::size_t piece, std::byte* data) const {
  const std::size_t bytes = bytes_of(piece), offset = offset_ + piece * kPiece;
  const std::optional<Digest>& written = pieces_[piece].digest;
  if (!written) throw std::logic_error("a piece is read that was never written");
  file_->read(data, bytes, offset);
  const Digest found = digest(data, bytes);
  if (found == *written) return;
  std::ostringstream text;
  text
      << "the backup in " << file_->directory() << " (backup_dir, a file without a name) is not "
      << "what was written: " << bytes << " bytes at offset " << offset << " have the checksum "
      << std::hex << found[1] << " instead of " << (*written)[1]
      << ". It is not used. Repeat the call; if the disk does not recover, restart the engine, or, "
         "if this is the tag 'weights', sleep at level 2, wake and load them";
  throw DiskError(text.str());
}

std::size_t DiskBackup::keep_written() {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    if (std::exchange(pieces_[i].written, false)) bytes += bytes_of(i);
  }
  return bytes;
}

void DiskBackup::forget_written() {
  for (Piece& piece : pieces_) {
    if (piece.written) piece = Piece();
  }
}

void DiskBackup::read(std::size_t offset, std::size_t bytes, std::byte* target) const {
  const PieceBuffer buffer;
  while (bytes > 0) {
    const std::size_t piece = offset / kPiece, skipped = offset % kPiece;
    const std::size_t count = std::min(bytes, bytes_of(piece) - skipped);
    read_piece(piece, buffer.data());
    std::memcpy(target, buffer.data() + skipped, count);
    offset += count;
    target += count;
    bytes -= count;
  }
}

void DiskBackup::release() noexcept {
  if (file_ && file_.use_count() > 1) file_->forget(bytes_, offset_);
  file_.reset();
  pieces_.clear();
}

}  // namespace camem
