// SPDX-License-Identifier: Apache-2.0
#include "pool/transfer.h"

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "ascendcl/optional.h"

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

void Transfer::open(int device) {
  Lanes& lanes = devices_[device];
  if (lanes.context) return;
  try {
    DeviceGuard caller(device);
    lanes.context.emplace(device);
    ContextGuard guard(*lanes.context);
    lanes.streams.push_back(CopyStream::default_of_context());
    const std::size_t half = available_streams().value_or(2 * kStreams) / 2;
    while (lanes.streams.size() < std::min(half + 1, kStreams)) {
      auto stream = CopyStream::create();
      if (!stream) break;
      lanes.streams.push_back(std::move(stream));
    }
  } catch (const std::exception&) {
    // Copies are synchronous until a later operation gets a context.
    if (lanes.streams.empty()) lanes.context.reset();
  }
}

void Transfer::with_stream(int device, const std::function<void(CopyStream*)>& work) {
  open(device);
  const Lanes& lanes = devices_[device];
  if (lanes.streams.empty()) return work(nullptr);
  const ContextGuard guard(*lanes.context);
  patience_.over = false;
  patience_.bytes_per_ms = kLeastLink;
  lanes.streams.front()->begin(patience_);
  work(lanes.streams.front().get());
}

bool Transfer::is_stuck() noexcept {
  bool stuck = false;
  for (auto& [device, lanes] : devices_) {
    for (const auto& stream : lanes.streams) {
      if (!stream->is_stuck()) continue;
      try {
        ContextGuard guard(*lanes.context);
        stream->look_again();
      } catch (const std::exception&) {
        // It counts as stuck.
      }
      stuck = stuck || stream->is_stuck();
    }
  }
  return stuck;
}

void Transfer::close() noexcept {
  staging_.close();
  disk_staging_.close();
  for (auto& [device, lanes] : devices_) {
    for (int attempt = 0; attempt < 2 && !lanes.streams.empty(); ++attempt) {
      try {
        const ContextGuard guard(*lanes.context);
        lanes.streams.clear();
      } catch (const std::exception&) {
        // Its streams cannot be destroyed outside it (107003), but with it.
      }
    }
    for (const auto& stream : lanes.streams) stream->ends_with_context();
  }
  devices_.clear();
}

void Transfer::run(int device, Direction direction, const std::vector<Chunk*>& chunks,
                   Parallelism parallelism, const Step& before, const Step& after) {
  if (chunks.empty()) return;
  const auto count = static_cast<unsigned>(std::min<std::size_t>(chunks.size(), 1u << 16));
  parallelism.threads = std::clamp(parallelism.threads, 1u, count);
  parallelism.depth = std::clamp(parallelism.depth, 1u, count);
  open(device);
  const Lanes& lanes = devices_[device];
  patience_.over = false;
  patience_.bytes_per_ms = kLeastLink / std::max<std::size_t>(1, lanes.streams.size());
  std::vector<CopyStream*> streams;
  for (const auto& stream : lanes.streams) {
    stream->begin(patience_);
    if (!stream->is_stuck()) streams.push_back(stream.get());
  }
  if (streams.empty() && !lanes.streams.empty()) {
    throw std::runtime_error("earlier copies have not completed");
  }

  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::optional<CopyFailure> failure;
  std::atomic<bool> failed{false};

  const auto work = [&](unsigned thread) {
    std::size_t index = 0;
    const auto finish = [&](Batch& batch) {
      if (batch.indices.empty()) return;
      index = batch.indices.front();
      batch.stream->wait(chunks[index]->bytes);
      if (failed) return;  // another thread may have received the error of these copies
      for (const std::size_t done : std::exchange(batch.indices, {})) {
        index = done;
        copied_ += chunks[index]->bytes;
        chunks[index]->copying = {};
        after(index);
      }
    };
    std::array<CopyStream*, 2> own{};
    for (unsigned i = 0; i < own.size() && !streams.empty(); ++i) {
      own[i] = streams[(thread * own.size() + i) % streams.size()];
    }
    std::array<Batch, 2> batches{{{own[0], {}}, {own[1], {}}}};
    std::optional<ContextGuard> guard;  // until the streams are drained
    try {
      if (streams.empty()) {
        guard.emplace(default_context(device));
      } else {
        guard.emplace(*lanes.context);
      }
      for (unsigned turn = 0; !failed && next < chunks.size(); ++turn) {
        Batch& batch = batches[turn % own.size()];
        finish(batch);
        while (batch.indices.size() < parallelism.depth && !failed) {
          const std::size_t mine = next++;
          if (mine >= chunks.size()) break;
          index = mine;
          before(index);
          const bool on_disk = chunks[index]->on_disk();
          if (batch.stream != nullptr && !on_disk && chunks[index]->backup.is_page_locked()) {
            batch.indices.push_back(index);  // first: a failed launch may be partly in flight
            chunks[index]->copying = {batch.stream};
            start_copy(direction, *chunks[index], *batch.stream);
          } else {
            Staging& staging = on_disk ? disk_staging_ : staging_;
            staging.copy(direction, *chunks[index], thread, own);
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
      if (!failed.exchange(true)) failure = CopyFailure{index, std::current_exception()};
    }
    for (const Batch& batch : batches) {
      if (!batch.indices.empty()) batch.stream->drain();
      for (const std::size_t ended : batch.indices) {
        if (!batch.stream->is_stuck()) chunks[ended]->copying = {};
      }
    }
  };

  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < parallelism.threads; ++i) others.emplace_back(work, i);
  } catch (const std::system_error&) {
    // No more threads are available: continue with those that were started.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  if (failure) throw *failure;
}

}  // namespace camem
