// SPDX-License-Identifier: Apache-2.0
#include "disk/backup.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <string>
#include <utility>

#include "disk/crc32c.h"

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
      sums_((bytes + kPiece - 1) / kPiece) {}

std::size_t DiskBackup::bytes_of(std::size_t piece) const {
  return std::min(kPiece, bytes_ - piece * kPiece);
}

void DiskBackup::write_piece(std::size_t piece, const std::byte* data) {
  const std::size_t bytes = bytes_of(piece);
  sums_[piece] = crc32c(data, bytes);
  file_->write(data, bytes, offset_ + piece * kPiece);
}

void DiskBackup::read_piece(std::size_t piece, std::byte* data) const {
  const std::size_t bytes = bytes_of(piece), offset = offset_ + piece * kPiece;
  file_->read(data, bytes, offset);
  const std::uint32_t sum = crc32c(data, bytes);
  if (sum == sums_[piece]) return;
  std::ostringstream text;
  text
      << "the backup in " << file_->directory() << " (backup_dir, a file without a name) is not "
      << "what was written: " << bytes << " bytes at offset " << offset << " have the checksum "
      << std::hex << sum << " instead of " << sums_[piece]
      << ". It is not used. Repeat the wake; if the disk does not recover, restart the engine, or, "
         "if this is the tag 'weights', sleep at level 2, wake and load them";
  throw DiskError(text.str());
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
  sums_.clear();
}

}  // namespace camem
