// SPDX-License-Identifier: Apache-2.0
//
// One allocation: a reserved address range, its physical chunks and their host backups.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ascendcl/copy_stream.h"
#include "ascendcl/vmm.h"
#include "host/memory.h"

namespace camem {

// Where the bytes of a chunk are. It changes only after the work that it names has succeeded, so
// it is true also in the middle of a failed transaction.
enum class Content : std::uint8_t {
  kDevice,  // mapped, usable
  kParked,  // in device memory that is not mapped: a sleep may yet be taken back, or could not be
  kHost,    // in the host backup
  kNone,    // forgotten
};

// The unit in which device memory is taken, copied and given back.
struct Chunk {
  std::byte* address = nullptr;
  std::size_t bytes = 0;
  PhysicalMemory memory;
  HostMemory backup;
  Content content = Content::kNone;
  std::array<const CopyStream*, 2> copying{};  // where copies of it are in flight, or may be

  // Makes sure that device memory is mapped at `address`. Throws; a repeated call goes on where
  // the failed one stopped.
  void attach(int device);

  // Whether a copy that did not end in time may still touch its memory, on the device and the host.
  void require_not_stuck() const;  // throws
  bool is_stuck() const;

  // Unmaps without giving the device memory back, so that remap() needs none. Throws.
  void park();

  // Has it on the device again: what is parked as it was, what is forgotten empty. Throws.
  void remap(int device);

  // Unmaps and gives the device memory back. Throws if unmapping fails, and while it is stuck;
  // memory that is unmapped but could not be given back is left for settle().
  void detach();

  // Gives back what `content` does not need: device memory unless it is on the device, the backup
  // unless it is on the host or kept for the next sleep. False if a call failed, or while it is
  // stuck; then repeat it.
  bool settle(bool keep_backup) noexcept;
};

using TagId = std::uint16_t;

// What an allocation is as a whole; derived from its chunks.
enum class State : std::uint8_t { kMapped, kOffloaded, kDiscarded, kTrimmed };

struct Allocation {
  // Reserves and maps `bytes` (a multiple of the granularity) in chunks of at most `chunk_bytes`.
  Allocation(int device, std::size_t bytes, TagId tag, std::size_t chunk_bytes);

  State state() const;

  // Whether the backups hold this content, so that it need not be copied again.
  bool backed_up(std::uint64_t sum) const;

  // Gives back what it holds, device first. Throws at the first failing call, and while it is
  // stuck, and can be repeated.
  void release();

  int device;
  TagId tag;
  Reservation range;
  std::vector<Chunk> chunks;
  // Checksum of the content that the backups of all chunks hold; empty when that is not certain.
  std::optional<std::uint64_t> backup_sum;
  // The backups were found not to hold it: the next sleep copies again.
  bool backup_distrusted = false;
  // torch keeps the segment but uses none of it: its memory was given back for good, and no wake
  // brings it back.
  bool trimmed = false;
};

}  // namespace camem
