// SPDX-License-Identifier: Apache-2.0
#include "transfer.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

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

// Copies that one stream carries.
struct Batch {
  aclrtStream stream = nullptr;
  std::vector<std::size_t> indices;
};

// Nobody may unmap or reuse memory under a copy that still runs.
void drain(aclrtStream stream) {
  if (aclrtSynchronizeStream(stream) == ACL_SUCCESS) return;
  if (aclrtSynchronizeStream(stream) == ACL_SUCCESS) return;
  CAMEM_CHECK_NOEXCEPT(aclrtSynchronizeDevice(), 0);
}

}  // namespace

std::vector<aclrtStream>& Transfer::streams(int device, std::size_t count) {
  std::vector<aclrtStream>& streams = streams_[device];
  while (streams.size() < count) {
    aclrtStream stream = nullptr;
    CAMEM_CHECK(aclrtCreateStream(&stream), 0);
    streams.push_back(stream);
  }
  return streams;
}

// A stream costs device memory: those that only pinning needed go back.
void Transfer::drop_spare_streams(int device) {
  std::vector<aclrtStream>& streams = streams_[device];
  for (; streams.size() > kKeptStreams; streams.pop_back()) {
    CAMEM_CHECK_NOEXCEPT(aclrtDestroyStream(streams.back()), 0);
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
  const std::vector<aclrtStream>& streams =
      this->streams(device, std::size_t{parallelism.threads} * kStreamsPerThread);

  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  const auto work = [&](unsigned thread) {
    std::size_t index = 0;
    const auto finish = [&](Batch& batch) {
      if (batch.indices.empty()) return;
      index = batch.indices.front();
      CAMEM_CHECK(aclrtSynchronizeStream(batch.stream), chunks[index]->bytes);
      for (const std::size_t done : std::exchange(batch.indices, {})) {
        index = done;
        copied_ += chunks[index]->bytes;
        after(index);
      }
    };
    Batch batches[kStreamsPerThread];
    for (unsigned i = 0; i < kStreamsPerThread; ++i) {
      batches[i].stream = streams[thread * kStreamsPerThread + i];
    }
    std::optional<DeviceGuard> guard;  // until the streams are drained
    try {
      guard.emplace(device);
      for (unsigned turn = 0; !failed && next < chunks.size(); ++turn) {
        Batch& batch = batches[turn % kStreamsPerThread];
        finish(batch);
        while (batch.indices.size() < parallelism.depth && !failed) {
          const std::size_t mine = next++;
          if (mine >= chunks.size()) break;
          index = mine;
          before(index);
          start_copy(direction, *chunks[index], batch.stream);
          batch.indices.push_back(index);
        }
      }
      for (Batch& batch : batches) {
        if (!failed) finish(batch);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failed.exchange(true)) {
        error = std::current_exception();
        *failed_index = index;
      }
    }
    for (const Batch& batch : batches) {
      if (!batch.indices.empty()) drain(batch.stream);
    }
  };

  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < parallelism.threads; ++i) others.emplace_back(work, i);
  } catch (const std::system_error&) {
    // The machine gives no more threads: go on with those that there are.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  drop_spare_streams(device);
  if (error) std::rethrow_exception(error);
}

}  // namespace camem
