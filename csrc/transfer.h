// SPDX-License-Identifier: Apache-2.0
//
// Moves chunks between device and host memory on several threads, each with its own stream.
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <functional>
#include <map>
#include <vector>

#include "allocation.h"

namespace camem {

enum class Direction { kDeviceToHost, kHostToDevice };

class Transfer {
 public:
  using Step = std::function<void(std::size_t index)>;

  // For every chunk, in order of start: before(i), an asynchronous copy that is waited for and
  // checked, after(i). While one thread is in before or after, the copies of the others run, so
  // `threads` is also the number of copies in flight. At the first exception no further chunk is
  // started, all copies in flight are waited for, and that exception is thrown; `failed_index`
  // then tells whose it was.
  void run(int device, Direction direction, const std::vector<Chunk*>& chunks, unsigned threads,
           const Step& before, const Step& after, std::size_t* failed_index);

 private:
  std::vector<aclrtStream>& streams(int device, unsigned count);

  std::map<int, std::vector<aclrtStream>> streams_;  // kept for the life of the process
};

}  // namespace camem
