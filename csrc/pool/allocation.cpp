// SPDX-License-Identifier: Apache-2.0
#include "pool/allocation.h"

#include <algorithm>
#include <stdexcept>

namespace camem {

void Chunk::attach(int device) {
  if (!memory) memory = PhysicalMemory(device, bytes);
  if (!memory.mapped()) memory.map(address);
}

void Chunk::park() {
  memory.unmap();
  content = Content::kParked;
}

void Chunk::remap(int device) {
  attach(device);
  content = Content::kDevice;
}

bool Chunk::is_stuck() const {
  return std::any_of(copying.begin(), copying.end(), [](const CopyStream* stream) {
    return stream != nullptr && stream->is_stuck();
  });
}

void Chunk::require_not_stuck() const {
  if (is_stuck()) throw std::runtime_error("a copy that has not completed uses this memory");
}

void Chunk::detach() {
  require_not_stuck();
  if (memory.mapped()) memory.unmap();
  try {
    if (memory) memory.release();
  } catch (const std::exception&) {
  }
}

bool Chunk::settle(Keep keep) noexcept {
  if (is_stuck()) return content == Content::kDevice && keep != Keep::kNothing;
  try {
    if (content != Content::kDevice && memory.mapped()) memory.unmap();
    if (content == Content::kBackup || content == Content::kNone) {
      if (memory) memory.release();
    }
    if (content == Content::kNone || (content == Content::kDevice && keep == Keep::kNothing)) {
      disk.release();
      backup.release();
    } else if (content != Content::kParked && keep != Keep::kAll) {
      if (on_disk()) backup.release();
      if (!on_disk() && keep == Keep::kNothing) disk.release();
    }
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

Allocation::Allocation(int device, std::size_t bytes, TagId tag, std::size_t chunk_bytes)
    : device(device), tag(tag), range(bytes) {
  chunks.resize((bytes + chunk_bytes - 1) / chunk_bytes);
  std::size_t offset = 0;
  for (Chunk& chunk : chunks) {
    chunk.address = range.base() + offset;
    chunk.bytes = std::min(chunk_bytes, bytes - offset);
    offset += chunk.bytes;
    chunk.remap(device);
  }
}

State Allocation::state() const {
  if (trimmed) return State::kTrimmed;
  bool mapped = true;
  for (const Chunk& chunk : chunks) {
    if (chunk.content == Content::kBackup || chunk.content == Content::kParked) {
      return State::kOffloaded;
    }
    mapped = mapped && chunk.content == Content::kDevice;
  }
  return mapped ? State::kMapped : State::kDiscarded;
}

bool Allocation::backed_up(std::uint64_t sum, Place place) const {
  const auto copied = [&](const Chunk& chunk) {
    return chunk.content == Content::kDevice && chunk.place == place && chunk.has_backup();
  };
  return backup_sum == sum && !backup_distrusted &&
         std::all_of(chunks.begin(), chunks.end(), copied);
}

void Allocation::release() {
  for (Chunk& chunk : chunks) {
    chunk.require_not_stuck();
    if (chunk.memory.mapped()) chunk.memory.unmap();
    if (chunk.memory) chunk.memory.release();
    chunk.content = Content::kNone;
    chunk.disk.release();
    chunk.backup.release();
  }
  range.release();
}

}  // namespace camem
