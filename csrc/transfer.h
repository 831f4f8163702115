// SPDX-License-Identifier: Apache-2.0
//
// Moves chunks between device and host memory on several threads, each with streams of its own.
#pragma once

#include <acl/acl.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <map>
#include <vector>

#include "allocation.h"

namespace camem {

enum class Direction { kDeviceToHost, kHostToDevice };

// How much is done at once: `threads` work at chunks, each with up to `depth` copies in flight on
// each of its streams, so that the link has work while the threads map, unmap or pin.
struct Parallelism {
  unsigned threads = 1;
  unsigned depth = 1;
};

class Transfer {
 public:
  using Step = std::function<void(std::size_t index)>;

  // For every chunk, in order of start: before(i), an asynchronous copy that is waited for and
  // checked, after(i). At the first exception no further chunk is started, all copies in flight are
  // waited for, and that exception is thrown; `failed_index` then tells whose it was. A chunk whose
  // copy was in flight then got no after(i).
  void run(int device, Direction direction, const std::vector<Chunk*>& chunks,
           Parallelism parallelism, const Step& before, const Step& after,
           std::size_t* failed_index);

  // Bytes that the copies of the current or last operation have moved. Thread-safe.
  std::size_t copied_bytes() const { return copied_; }
  void reset_copied_bytes() { copied_ = 0; }

 private:
  // A thread waits for one of its streams while the other copies. It waits for the stream and not
  // for an event behind a copy, since only the stream tells whether its work failed.
  static constexpr unsigned kStreamsPerThread = 2;
  static constexpr std::size_t kKeptStreams = 6;

  std::vector<aclrtStream>& streams(int device, std::size_t count);
  void drop_spare_streams(int device);

  std::map<int, std::vector<aclrtStream>> streams_;
  std::atomic<std::size_t> copied_{0};
};

}  // namespace camem
