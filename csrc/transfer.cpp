// SPDX-License-Identifier: Apache-2.0
#include "transfer.h"

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "acl_check.h"
#include "acl_optional.h"

namespace camem {
namespace {

void start_copy(Direction direction, const Chunk& chunk, CopyStream& stream) {
  if (direction == Direction::kDeviceToHost) {
    stream.copy(chunk.backup.data(), chunk.address, chunk.bytes, ACL_MEMCPY_DEVICE_TO_HOST);
  } else {
    stream.copy(chunk.address, chunk.backup.data(), chunk.bytes, ACL_MEMCPY_HOST_TO_DEVICE);
  }
}

// Copies that one stream carries.
struct Batch {
  CopyStream* stream = nullptr;
  std::vector<std::size_t> indices;
};

}  // namespace

CopyStream* Transfer::open(int device) {
  auto& streams = streams_[device];
  if (streams.empty()) {
    const std::size_t count = (available_streams().value_or(2 * kStreams) + 1) / 2;
    while (streams.size() < std::min(count, kStreams)) {
      auto stream = CopyStream::create();
      if (!stream) break;
      streams.push_back(std::move(stream));
    }
  }
  return streams.empty() ? nullptr : streams.front().get();
}

void Transfer::run(int device, Direction direction, const std::vector<Chunk*>& chunks,
                   Parallelism parallelism, const Step& before, const Step& after,
                   std::size_t* failed_index) {
  if (chunks.empty()) return;
  const auto count = static_cast<unsigned>(std::min<std::size_t>(chunks.size(), 1u << 16));
  parallelism.threads = std::clamp(parallelism.threads, 1u, count);
  parallelism.depth = std::clamp(parallelism.depth, 1u, count);
  DeviceGuard caller(device);
  open(device);
  const auto& streams = streams_[device];
  for (const auto& stream : streams) stream->begin();

  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  const auto work = [&](unsigned thread) {
    std::size_t index = 0;
    const auto finish = [&](Batch& batch) {
      if (batch.indices.empty()) return;
      index = batch.indices.front();
      batch.stream->wait(chunks[index]->bytes);
      if (failed)
        return;  // the failure may have been of these copies, and another thread told of it
      for (const std::size_t done : std::exchange(batch.indices, {})) {
        index = done;
        copied_ += chunks[index]->bytes;
        after(index);
      }
    };
    std::array<CopyStream*, 2> own{};
    for (unsigned i = 0; i < own.size() && !streams.empty(); ++i) {
      own[i] = streams[(thread * own.size() + i) % streams.size()].get();
    }
    std::array<Batch, 2> batches{{{own[0], {}}, {own[1], {}}}};
    std::optional<DeviceGuard> guard;  // until the streams are drained
    try {
      guard.emplace(device);
      for (unsigned turn = 0; !failed && next < chunks.size(); ++turn) {
        Batch& batch = batches[turn % own.size()];
        finish(batch);
        while (batch.indices.size() < parallelism.depth && !failed) {
          const std::size_t mine = next++;
          if (mine >= chunks.size()) break;
          index = mine;
          before(index);
          if (batch.stream != nullptr && chunks[index]->backup.is_page_locked()) {
            batch.indices.push_back(index);  // first: a launch that fails may be in flight in part
            start_copy(direction, *chunks[index], *batch.stream);
          } else {
            staging_.copy(direction, *chunks[index], thread, own);
            copied_ += chunks[index]->bytes;
            after(index);
          }
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
      if (!batch.indices.empty()) batch.stream->drain();
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
  if (error) std::rethrow_exception(error);
}

}  // namespace camem
