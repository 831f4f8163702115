// SPDX-License-Identifier: Apache-2.0
#include "transfer.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "acl_check.h"

namespace camem {
namespace {

void start_copy(Direction direction, const Chunk& chunk, aclrtStream stream) {
  const bool offload = direction == Direction::kDeviceToHost;
  std::byte* target = offload ? chunk.backup.data() : chunk.address;
  const std::byte* source = offload ? chunk.address : chunk.backup.data();
  CAMEM_CHECK(
      aclrtMemcpyAsync(target, chunk.bytes, source, chunk.bytes,
                       offload ? ACL_MEMCPY_DEVICE_TO_HOST : ACL_MEMCPY_HOST_TO_DEVICE, stream),
      chunk.bytes);
}

}  // namespace

std::vector<Transfer::Lane>& Transfer::lanes(int device, Parallelism parallelism) {
  std::vector<Lane>& lanes = lanes_[device];
  while (lanes.size() < parallelism.threads) {
    Lane lane;
    CAMEM_CHECK(aclrtCreateStream(&lane.stream), 0);
    lanes.push_back(lane);
  }
  for (unsigned i = 0; i < parallelism.threads; ++i) {
    while (lanes[i].events.size() < parallelism.depth) {
      aclrtEvent event = nullptr;
      CAMEM_CHECK(aclrtCreateEventWithFlag(&event, ACL_EVENT_SYNC), 0);
      lanes[i].events.push_back(event);
    }
  }
  return lanes;
}

// A stream costs device memory: those that only pinning needed go back.
void Transfer::drop_spare_lanes(int device) {
  std::vector<Lane>& lanes = lanes_[device];
  for (; lanes.size() > kKeptLanes; lanes.pop_back()) {
    for (const aclrtEvent event : lanes.back().events) {
      CAMEM_CHECK_NOEXCEPT(aclrtDestroyEvent(event), 0);
    }
    CAMEM_CHECK_NOEXCEPT(aclrtDestroyStream(lanes.back().stream), 0);
  }
}

void Transfer::run(int device, Direction direction, const std::vector<Chunk*>& chunks,
                   Parallelism parallelism, const Step& before, const Step& after,
                   std::size_t* failed_index) {
  if (chunks.empty()) return;
  const auto count = static_cast<unsigned>(std::min<std::size_t>(chunks.size(), 1u << 16));
  parallelism.threads = std::clamp(parallelism.threads, 1u, count);
  parallelism.depth = std::clamp(parallelism.depth, 1u, count);
  DeviceGuard caller(device);
  const std::vector<Lane>& lanes = this->lanes(device, parallelism);

  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  const auto work = [&](const Lane& lane) {
    std::vector<std::size_t> flying;  // indices in order of start; the k-th has event k % depth
    std::size_t done = 0;
    std::size_t index = 0;
    const auto finish_oldest = [&] {
      index = flying[done];
      CAMEM_CHECK(aclrtSynchronizeEvent(lane.events[done % parallelism.depth]),
                  chunks[index]->bytes);
      ++done;
      copied_ += chunks[index]->bytes;
      after(index);
    };
    try {
      DeviceGuard guard(device);
      while (!failed && (index = next++) < chunks.size()) {
        before(index);
        if (failed) break;
        start_copy(direction, *chunks[index], lane.stream);
        flying.push_back(index);
        CAMEM_CHECK(
            aclrtRecordEvent(lane.events[(flying.size() - 1) % parallelism.depth], lane.stream),
            chunks[index]->bytes);
        if (flying.size() - done == parallelism.depth) finish_oldest();
      }
      while (!failed && done < flying.size()) finish_oldest();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failed.exchange(true)) {
        error = std::current_exception();
        *failed_index = std::min(index, chunks.size() - 1);
      }
    }
    // Copies may still run: nobody may unmap or reuse their memory before they have ended.
    if (done < flying.size()) {
      aclError code = aclrtSynchronizeStream(lane.stream);
      if (code != ACL_SUCCESS) code = aclrtSynchronizeStream(lane.stream);
      check_noexcept(code, "aclrtSynchronizeStream", 0);
    }
  };

  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < parallelism.threads; ++i) {
      others.emplace_back(work, std::cref(lanes[i]));
    }
  } catch (const std::system_error&) {
    // The machine gives no more threads: go on with those that there are.
  }
  work(lanes[0]);
  for (std::thread& thread : others) thread.join();
  drop_spare_lanes(device);
  if (error) std::rethrow_exception(error);
}

}  // namespace camem
