// SPDX-License-Identifier: Apache-2.0
#include "pool/staging.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <thread>
#include <utility>

#include "ascendcl/check.h"
#include "ascendcl/contexts.h"

namespace camem {
namespace {

aclrtMemcpyKind kind_of(Direction direction) {
  return direction == Direction::kDeviceToHost ? ACL_MEMCPY_DEVICE_TO_HOST
                                               : ACL_MEMCPY_HOST_TO_DEVICE;
}

// Runs the work on each of `threads` threads, and returns the seconds until all have finished.
double seconds_of(unsigned threads, const std::function<void(unsigned)>& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(work, i);
  } catch (const std::exception&) {
    // No more threads are available: continue with those that were started.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void Staging::open(int device, unsigned threads, HostSource source) {
  const auto gone = [](const Lane& lane) { return !lane.blocks[0]; };
  lanes_.erase(std::remove_if(lanes_.begin(), lanes_.end(), gone), lanes_.end());
  if (lanes_.size() >= threads) return;
  std::vector<Lane> lanes(threads - lanes_.size());
  seconds_of(static_cast<unsigned>(lanes.size()), [&](unsigned thread) {
    try {
      DeviceGuard guard(device);
      take_blocks(lanes[thread], source);
    } catch (const std::exception&) {
      // This thread copies synchronously.
    }
  });
  for (Lane& lane : lanes) {
    if (lane.blocks[0]) lanes_.push_back(std::move(lane));
  }
}

void Staging::open_as_needed(unsigned threads, HostSource source) {
  lanes_.resize(std::max<std::size_t>(lanes_.size(), threads));
  for (Lane& lane : lanes_) {
    if (!lane.blocks[0]) lane.needed = source;
  }
}

// Both or none: without, its thread copies synchronously.
void Staging::take_blocks(Lane& lane, HostSource source) const {
  lane.needed.reset();
  try {
    for (HostMemory& block : lane.blocks) block = HostMemory::page_locked(piece_, source);
  } catch (const std::exception&) {
    lane.blocks = {};
  }
}

std::optional<HostSpeeds> Staging::open_and_measure(int device, unsigned threads,
                                                    HostSource source) {
  close();
  const double locking = seconds_of(1, [&](unsigned) { open(device, threads, source); });
  if (lanes_.empty()) return std::nullopt;
  const auto count = static_cast<unsigned>(lanes_.size());
  const std::size_t bytes = count * 2 * piece_;
  HostSpace space(bytes);
  std::byte* first = space.map(bytes);
  const double copying = seconds_of(count, [&](unsigned thread) {
    for (unsigned i = 0; i < 2; ++i) {
      std::memcpy(first + (2 * thread + i) * piece_, lanes_[thread].blocks[i].data(), piece_);
    }
  });
  munmap(first, bytes);
  return HostSpeeds{static_cast<double>(bytes) / locking, static_cast<double>(bytes) / copying};
}

void Staging::close() noexcept {
  lanes_.clear();
  std::lock_guard<std::mutex> lock(mutex_);
  const auto over = [](const StuckLane& stuck) {
    return !stuck.streams[0]->is_stuck() && !stuck.streams[1]->is_stuck();
  };
  stuck_.erase(std::remove_if(stuck_.begin(), stuck_.end(), over), stuck_.end());
}

std::size_t Staging::bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto lanes = std::count_if(lanes_.begin(), lanes_.end(),
                                   [](const Lane& lane) { return bool(lane.blocks[0]); });
  return (static_cast<std::size_t>(lanes) + stuck_.size()) * 2 * piece_;
}

void Staging::copy_synchronously(Direction direction, Chunk& chunk) const {
  const bool offload = direction == Direction::kDeviceToHost;
  const auto copy = [&](std::byte* host, std::byte* device, std::size_t bytes) {
    CAMEM_CHECK(aclrtMemcpy(offload ? host : device, bytes, offload ? device : host, bytes,
                            kind_of(direction)),
                bytes);
  };
  if (!chunk.on_disk()) return copy(chunk.backup.data(), chunk.address, chunk.bytes);
  const PieceBuffer buffer;
  for (std::size_t i = 0; i < chunk.disk.pieces(); ++i) {
    if (!offload) chunk.disk.read_piece(i, buffer.data());
    copy(buffer.data(), chunk.address + i * piece_, chunk.disk.bytes_of(i));
    if (offload) chunk.disk.write_piece(i, buffer.data());
  }
}

void Staging::copy(Direction direction, Chunk& chunk, unsigned thread,
                   const std::array<CopyStream*, 2>& streams) {
  if (thread < lanes_.size() && lanes_[thread].needed && streams[0] != nullptr) {
    take_blocks(lanes_[thread], *lanes_[thread].needed);
  }
  if (thread >= lanes_.size() || !lanes_[thread].blocks[0] || streams[0] == nullptr) {
    return copy_synchronously(direction, chunk);
  }
  const bool offload = direction == Direction::kDeviceToHost;
  Blocks& blocks = lanes_[thread].blocks;
  const std::size_t pieces = (chunk.bytes + piece_ - 1) / piece_;
  const auto bytes_of = [&](std::size_t i) { return std::min(piece_, chunk.bytes - i * piece_); };
  const auto launch = [&](std::size_t i) {
    std::byte* device = chunk.address + i * piece_;
    std::byte* block = blocks[i % 2].data();
    streams[i % 2]->copy(offload ? block : device, offload ? device : block, bytes_of(i),
                         kind_of(direction));
  };
  const auto finish = [&](std::size_t i) { streams[i % 2]->wait(bytes_of(i)); };
  const auto store = [&](std::size_t i) {
    const std::byte* block = blocks[i % 2].data();
    if (chunk.on_disk()) return chunk.disk.write_piece(i, block);
    std::memcpy(chunk.backup.data() + i * piece_, block, bytes_of(i));
  };
  const auto load = [&](std::size_t i) {
    std::byte* block = blocks[i % 2].data();
    if (chunk.on_disk()) return chunk.disk.read_piece(i, block);
    std::memcpy(block, chunk.backup.data() + i * piece_, bytes_of(i));
  };
  try {
    if (offload) {
      for (std::size_t i = 0; i < std::min<std::size_t>(2, pieces); ++i) launch(i);
      for (std::size_t i = 0; i < pieces; ++i) {
        finish(i);
        store(i);
        if (i + 2 < pieces) launch(i + 2);
      }
    } else {
      for (std::size_t i = 0; i < pieces; ++i) {
        if (i >= 2) finish(i - 2);
        load(i);
        launch(i);
      }
      for (std::size_t i = pieces - std::min<std::size_t>(2, pieces); i < pieces; ++i) finish(i);
    }
  } catch (...) {
    for (CopyStream* stream : streams) stream->drain();
    chunk.copying = {streams[0], streams[1]};
    if (chunk.is_stuck()) {
      std::lock_guard<std::mutex> lock(mutex_);
      stuck_.push_back({std::exchange(blocks, {}), streams});
    }
    throw;
  }
}

}  // namespace camem
