// SPDX-License-Identifier: Apache-2.0
//
// Copies between the device and backups that AscendCL cannot copy to asynchronously, plain host
// memory and files, in pieces through page-locked blocks: while one piece crosses the link, the
// thread copies another one in host memory, or has the disk write or read it.
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
  explicit Staging(std::size_t piece) : piece_(piece) {}

  // Gives each of `threads` threads two blocks, or fewer if the host has no more.
  void open(int device, unsigned threads, HostSource source);
  // The same, but each thread takes its blocks when it first copies, so that the others need not
  // wait for them.
  void open_as_needed(unsigned threads, HostSource source);
  void close() noexcept;
  std::size_t bytes();

  // Frees its blocks, allocates them again, and measures how fast that is and how fast the threads
  // copy from them. Empty if the host has no memory for them.
  std::optional<HostSpeeds> open_and_measure(int device, unsigned threads, HostSource source);

  // Copies the chunk to or from its backup, and returns when that is done. `thread` counts from 0
  // and uses its own blocks; without any, or without streams, the copy is a synchronous one, for
  // which the runtime locks pages itself, and which has no deadline: of memory that is not
  // page-locked, aclrtMemcpyAsync is the same. Throws AclError or DiskError; then nothing is in
  // flight any more, or the chunk is stuck.
  void copy(Direction direction, Chunk& chunk, unsigned thread,
            const std::array<CopyStream*, 2>& streams);

 private:
  using Blocks = std::array<HostMemory, 2>;
  struct Lane {
    Blocks blocks;
    std::optional<HostSource> needed;  // from which its thread still has to take the blocks
  };
  struct StuckLane {
    Blocks blocks;
    std::array<CopyStream*, 2> streams;
  };

  void take_blocks(Lane& lane, HostSource source) const;
  void copy_synchronously(Direction direction, Chunk& chunk) const;

  const std::size_t piece_;  // of a file: DiskBackup::kPiece
  std::vector<Lane> lanes_;
  std::mutex mutex_;
  std::vector<StuckLane> stuck_;  // blocks that copies may still use; their threads have none
};

}  // namespace camem
