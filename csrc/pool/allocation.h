// SPDX-License-Identifier: Apache-2.0
//
// An allocation: a reserved address range, its physical chunks and their backups.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ascendcl/copy_stream.h"
#include "ascendcl/vmm.h"
#include "disk/backup.h"
#include "host/memory.h"

namespace camem {

// Where the bytes of a chunk are. It changes only after the work has succeeded, so it is correct
// even in the middle of a failed transaction.
enum class Content : std::uint8_t {
  kDevice,  // mapped, usable
  kParked,  // in unmapped device memory, until the commit or after a failed rollback
  kBackup,  // in the backup, in host memory or on disk
  kNone,    // discarded
};

// Where a backup lies, or is going to lie.
enum class Place : std::uint8_t { kHost, kDisk };

// Which backups a sweep leaves to chunks that do not need them now.
enum class Keep : std::uint8_t {
  kNothing,
  kForNextSleep,  // the one of a chunk that is awake, and the file of one that sleeps in host
                  // memory
  kAll,           // something is prepared, and may need either
};

// The unit in which device memory is allocated, copied and freed.
struct Chunk {
  std::byte* address = nullptr;
  std::size_t bytes = 0;
  PhysicalMemory memory;
  HostMemory backup;
  DiskBackup disk;
  Place place = Place::kHost;  // which of the two counts; the file may be that of an earlier sleep
  Content content = Content::kNone;
  std::array<const CopyStream*, 2> copying{};  // streams that may have copies of it in flight

  bool on_disk() const { return place == Place::kDisk; }
  bool has_backup() const { return on_disk() ? bool(disk) : bool(backup); }

  // Makes sure that device memory is mapped at `address`. Throws; a retry continues where the
  // failed call stopped.
  void attach(int device);

  // Whether a timed-out copy may still access its memory, on the device or the host.
  void require_not_stuck() const;  // throws
  bool is_stuck() const;

  // Unmaps but keeps the device memory, so that remap() needs no new memory. Throws.
  void park();

  // Maps it again: parked memory with its content, discarded memory without. Throws.
  void remap(int device);

  // Unmaps and frees the device memory. Throws if unmapping fails or the chunk is stuck. settle()
  // frees memory that was unmapped but could not be freed.
  void detach();

  // Frees what `content` does not need: device memory unless the content is there, and backups
  // unless the content is there or they are kept. False if a call failed or the chunk is stuck:
  // retry then.
  bool settle(Keep keep) noexcept;
};

using TagId = std::uint16_t;

// The state of a whole allocation, derived from its chunks.
enum class State : std::uint8_t { kMapped, kOffloaded, kDiscarded, kTrimmed };

struct Allocation {
  // Reserves and maps `bytes` (a multiple of the granularity) in chunks of at most `chunk_bytes`.
  Allocation(int device, std::size_t bytes, TagId tag, std::size_t chunk_bytes);

  State state() const;

  // Whether backups in this place already hold this content.
  bool backed_up(std::uint64_t sum, Place place) const;

  // Frees everything, device memory first. Throws at the first failing call or while a chunk is
  // stuck, and can be retried.
  void release();

  int device;
  TagId tag;
  Reservation range;
  std::vector<Chunk> chunks;
  // Checksum of the content of all backups; empty if it is not known.
  std::optional<std::uint64_t> backup_sum;
  // A wake found the backups to be wrong, so the next sleep copies again.
  bool backup_distrusted = false;
  // torch keeps the segment without using it. Its memory was freed for good; no wake maps it again.
  bool trimmed = false;
};

}  // namespace camem
