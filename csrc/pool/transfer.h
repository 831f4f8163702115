// SPDX-License-Identifier: Apache-2.0
//
// Moves chunks between device and host memory on several threads over a few streams.
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

// How much is done at once: `threads` work at chunks, each with up to `depth` copies in flight on
// each of two streams, so that the link has work while the threads map, unmap or take host memory.
struct Parallelism {
  unsigned threads = 1;
  unsigned depth = 1;
};

// A chunk could not be copied. `cause` is what was thrown.
struct CopyFailure {
  std::size_t index;
  std::exception_ptr cause;
};

class Transfer {
 public:
  using Step = std::function<void(std::size_t index)>;

  // Takes a context and streams of this device, or as many as it gives; with none, copies are
  // synchronous. To be called before graphs are captured, which take what streams the device has.
  void open(int device);

  // Does something with a stream of this device, in its context; with null where there is none.
  void with_stream(int device, const std::function<void(CopyStream*)>& work);

  // Whether copies of an earlier operation have still not ended.
  bool is_stuck() noexcept;

  // Gives the streams and their contexts back. Nothing may be in flight.
  void close() noexcept;

  // From now on a copy fails that takes longer than this and what the slowest link needs for it.
  void set_patience(std::chrono::milliseconds patience) { patience_.least = patience; }

  // For every chunk, in order of start: before(i), a copy that is waited for and checked, after(i).
  // Copies are asynchronous where the chunk's backup is page-locked after before(i). At the first
  // exception no further chunk is started, all copies in flight are waited for, and CopyFailure is
  // thrown for the chunk of the thread that met it. A chunk whose copy was in flight then got no
  // after(i), and is stuck if that copy has not ended in time.
  void run(int device, Direction direction, const std::vector<Chunk*>& chunks,
           Parallelism parallelism, const Step& before, const Step& after);

  // Blocks for those whose backup is not page-locked.
  Staging& staging() { return staging_; }

  // Bytes that the copies of the current or last operation have moved. Thread-safe.
  std::size_t copied_bytes() const { return copied_; }
  void reset_copied_bytes() { copied_ = 0; }

 private:
  // Two for each thread that copies: it waits for one while the other copies. It waits for the
  // stream and not for an event behind a copy, since only the stream tells whether its work failed.
  static constexpr std::size_t kStreams = 6;
  static constexpr std::size_t kLeastLink = 100'000;  // bytes per millisecond

  struct Lanes {
    std::optional<OwnContext> context;
    std::vector<std::unique_ptr<CopyStream>> streams;
  };

  std::map<int, Lanes> devices_;
  Patience patience_;
  Staging staging_;
  std::atomic<std::size_t> copied_{0};
};

}  // namespace camem
