// SPDX-License-Identifier: Apache-2.0
//
// What the allocator of a process is told once.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <set>

#include "host/source.h"
#include "pool/allocation.h"

namespace camem {

// What a sleep does for whose backup no page-locked memory is ready.
enum class Unprepared : std::uint8_t {
  kMeasured,  // what is faster on this host
  kLock,      // takes page-locked memory
  kStage,     // takes plain memory, and copies through page-locked blocks
};

struct Settings {
  std::size_t chunk_bytes = std::size_t{64} << 20;
  bool keep_host_backup = true;
  unsigned copy_threads = 3;   // threads that copy once the host memory is there
  unsigned host_threads = 16;  // threads that take host memory; at most one a core
  // What launched before may take to end, and a copy beyond what the slowest link needs for it.
  std::chrono::milliseconds device_timeout{60000};
  HostChoice host_choice{HostSource::kAcl, ""};  // registered memory is tried first
  Unprepared unprepared = Unprepared::kMeasured;
  // Tags whose content nobody needs once a sleep has begun. They take memory in larger chunks
  // (fewer calls), and a sleep of a single rank gives it back at once: one that fails maps it
  // again, empty.
  std::size_t scratch_chunk_bytes = std::size_t{1} << 30;
  std::set<TagId> scratch_tags;
};

}  // namespace camem
