// SPDX-License-Identifier: Apache-2.0
//
// Copies between the device and memory that is not page-locked, piece by piece through page-locked
// blocks: while one piece crosses the link, the thread copies another in host memory.
#pragma once

#include <acl/acl.h>

#include <array>
#include <mutex>
#include <optional>
#include <vector>

#include "ascendcl/copy_stream.h"
#include "host/source.h"
#include "pool/allocation.h"

namespace camem {

enum class Direction { kDeviceToHost, kHostToDevice };

class Staging {
 public:
  // Gives each of `threads` threads two blocks, or as many of them as the host gives.
  void open(int device, unsigned threads, HostSource source);
  void close() noexcept;
  std::size_t bytes();

  // Gives the blocks that it has back, takes all anew, and tells how fast that was and how fast the
  // threads copy from them. Nothing if the host gives none.
  std::optional<HostSpeeds> open_and_measure(int device, unsigned threads, HostSource source);

  // Copies the chunk to or from its backup, and returns when that is done. `thread` counts from 0
  // and uses its own blocks; without any, or without streams, the copy is a synchronous one, for
  // which the runtime locks pages itself. Throws AclError; then nothing is in flight any more, or
  // the chunk is stuck.
  void copy(Direction direction, Chunk& chunk, unsigned thread,
            const std::array<CopyStream*, 2>& streams);

 private:
  using Lane = std::array<HostMemory, 2>;
  struct StuckLane {
    Lane lane;
    std::array<CopyStream*, 2> streams;
  };

  std::vector<Lane> lanes_;
  std::mutex mutex_;
  std::vector<StuckLane> stuck_;  // blocks that copies may still use, and whose threads have none
};

}  // namespace camem
