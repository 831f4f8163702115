// SPDX-License-Identifier: Apache-2.0
//
// The allocator's settings, which a process sets once.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>

#include "host/source.h"
#include "pool/allocation.h"

namespace camem {

// What a sleep does if no page-locked memory was prepared for its backup.
enum class Unprepared : std::uint8_t {
  kMeasured,  // whichever is faster on this host
  kLock,      // allocate page-locked memory
  kStage,     // allocate plain memory, and copy through page-locked blocks
};

struct Settings {
  std::size_t chunk_bytes = std::size_t{64} << 20;
  bool keep_host_backup = true;
  unsigned copy_threads = 3;   // threads that copy into existing host memory
  unsigned host_threads = 16;  // threads that allocate host memory, at most one per core
  // How long earlier work may take, and a copy beyond the time that the slowest link needs for it.
  std::chrono::milliseconds device_timeout{60000};
  HostChoice host_choice{HostSource::kAcl, ""};  // registered memory is tried first
  Unprepared unprepared = Unprepared::kMeasured;
  Place place = Place::kHost;  // where a sleep puts backups if its caller does not say
  // Backups on disk are files in this directory, and are copied through page-locked blocks of this
  // size together.
  std::string backup_dir;
  std::size_t disk_blocks_bytes = std::size_t{256} << 20;
  // The content of these tags is not needed once a sleep has begun. Their chunks are larger (fewer
  // calls), and a single rank frees them before the commit; a rollback maps them again, empty.
  std::size_t scratch_chunk_bytes = std::size_t{1} << 30;
  std::set<TagId> scratch_tags;
};

}  // namespace camem
