// SPDX-License-Identifier: Apache-2.0
//
// Copies chunks between device and host memory with several threads and a few streams.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "ascendcl/contexts.h"
#include "pool/staging.h"

namespace camem {

// `threads` threads process chunks, each with up to `depth` copies in flight on each of two
// streams, so that the link stays busy while the threads map, unmap or allocate host memory.
struct Parallelism {
  unsigned threads = 1;
  unsigned depth = 1;
};

// A chunk could not be copied. `cause` is the original exception.
struct CopyFailure {
  std::size_t index;
  std::exception_ptr cause;
};

class Transfer {
 public:
  using Step = std::function<void(std::size_t index)>;

  // Creates a context and streams on this device, or as many as it has left; without any, copies
  // are synchronous. Call it before graphs are captured, because these use up the device's streams.
  void open(int device);

  // Runs `work` with a stream of this device in its context, or with null if there is none.
  void with_stream(int device, const std::function<void(CopyStream*)>& work);

  // Whether copies of an earlier operation are still in flight.
  bool is_stuck() noexcept;

  // Destroys the streams and their contexts. Nothing may be in flight.
  void close() noexcept;

  // From now on a copy fails if it takes this long plus the time that the slowest link needs for
  // it.
  void set_patience(std::chrono::milliseconds patience) { patience_.least = patience; }

  // Calls before(i), copies chunk i, waits for the copy, and calls after(i), for every chunk. A
  // copy is asynchronous if the chunk's backup is page-locked after before(i). At the first
  // exception, no further chunk is started, all copies in flight are waited for, and CopyFailure is
  // thrown for the chunk that failed. For a chunk whose copy was in flight, after(i) is not called,
  // and the chunk is stuck if its copy timed out.
  void run(int device, Direction direction, const std::vector<Chunk*>& chunks,
           Parallelism parallelism, const Step& before, const Step& after);

  // Blocks for copies of chunks whose backup is not page-locked, and of those whose backup is on
  // disk.
  Staging& staging() { return staging_; }
  Staging& disk_staging() { return disk_staging_; }

  // Bytes copied by the current or last operation. Thread-safe.
  std::size_t copied_bytes() const { return copied_; }
  void reset_copied_bytes() { copied_ = 0; }
  void add_copied_bytes(std::size_t bytes) { copied_ += bytes; }

 private:
  // Two for each copying thread: it waits for one while the other copies. It waits for the stream
  // instead of an event behind the copy, because only the stream reports whether its work failed.
  static constexpr std::size_t kStreams = 6;
  static constexpr std::size_t kLeastLink = 100'000;  // bytes per millisecond
  // Large enough for the link's full speed, small enough to be allocated quickly.
  static constexpr std::size_t kPiece = std::size_t{2} << 20;

  struct Lanes {
    std::optional<OwnContext> context;
    std::vector<std::unique_ptr<CopyStream>> streams;
  };

  std::map<int, Lanes> devices_;
  Patience patience_;
  Staging staging_{kPiece};
  Staging disk_staging_{DiskBackup::kPiece};
  std::atomic<std::size_t> copied_{0};
};

}  // namespace camem
