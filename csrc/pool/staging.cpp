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

// Large enough for the link's full speed, small enough to be allocated quickly.
constexpr std::size_t kPiece = std::size_t{2} << 20;

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
  const auto gone = [](const Lane& lane) { return !lane[0]; };
  lanes_.erase(std::remove_if(lanes_.begin(), lanes_.end(), gone), lanes_.end());
  if (lanes_.size() >= threads) return;
  std::vector<Lane> lanes(threads - lanes_.size());
  seconds_of(static_cast<unsigned>(lanes.size()), [&](unsigned thread) {
    try {
      DeviceGuard guard(device);
      for (HostMemory& block : lanes[thread]) block = HostMemory::page_locked(kPiece, source);
    } catch (const std::exception&) {
      lanes[thread] = {};  // this thread copies synchronously
    }
  });
  for (Lane& lane : lanes) {
    if (lane[0] && lane[1]) lanes_.push_back(std::move(lane));
  }
}

std::optional<HostSpeeds> Staging::open_and_measure(int device, unsigned threads,
                                                    HostSource source) {
  close();
  const double locking = seconds_of(1, [&](unsigned) { open(device, threads, source); });
  if (lanes_.empty()) return std::nullopt;
  const auto count = static_cast<unsigned>(lanes_.size());
  const std::size_t bytes = count * 2 * kPiece;
  HostSpace space(bytes);
  std::byte* first = space.map(bytes);
  const double copying = seconds_of(count, [&](unsigned thread) {
    for (unsigned i = 0; i < 2; ++i) {
      std::memcpy(first + (2 * thread + i) * kPiece, lanes_[thread][i].data(), kPiece);
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
  const auto lanes =
      std::count_if(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return bool(lane[0]); });
  return (static_cast<std::size_t>(lanes) + stuck_.size()) * 2 * kPiece;
}

void Staging::copy(Direction direction, Chunk& chunk, unsigned thread,
                   const std::array<CopyStream*, 2>& streams) {
  const bool offload = direction == Direction::kDeviceToHost;
  const aclrtMemcpyKind kind = offload ? ACL_MEMCPY_DEVICE_TO_HOST : ACL_MEMCPY_HOST_TO_DEVICE;
  std::byte* host = chunk.backup.data();
  if (thread >= lanes_.size() || !lanes_[thread][0] || streams[0] == nullptr) {
    CAMEM_CHECK(aclrtMemcpy(offload ? host : chunk.address, chunk.bytes,
                            offload ? chunk.address : host, chunk.bytes, kind),
                chunk.bytes);
    return;
  }
  Lane& lane = lanes_[thread];
  const std::size_t pieces = (chunk.bytes + kPiece - 1) / kPiece;
  const auto bytes_of = [&](std::size_t i) { return std::min(kPiece, chunk.bytes - i * kPiece); };
  const auto launch = [&](std::size_t i) {
    std::byte* device = chunk.address + i * kPiece;
    std::byte* block = lane[i % 2].data();
    streams[i % 2]->copy(offload ? block : device, offload ? device : block, bytes_of(i), kind);
  };
  const auto finish = [&](std::size_t i) { streams[i % 2]->wait(bytes_of(i)); };
  try {
    if (offload) {
      for (std::size_t i = 0; i < std::min<std::size_t>(2, pieces); ++i) launch(i);
      for (std::size_t i = 0; i < pieces; ++i) {
        finish(i);
        std::memcpy(host + i * kPiece, lane[i % 2].data(), bytes_of(i));
        if (i + 2 < pieces) launch(i + 2);
      }
    } else {
      for (std::size_t i = 0; i < pieces; ++i) {
        if (i >= 2) finish(i - 2);
        std::memcpy(lane[i % 2].data(), host + i * kPiece, bytes_of(i));
        launch(i);
      }
      for (std::size_t i = pieces - std::min<std::size_t>(2, pieces); i < pieces; ++i) finish(i);
    }
  } catch (...) {
    for (CopyStream* stream : streams) stream->drain();
    chunk.copying = {streams[0], streams[1]};
    if (chunk.is_stuck()) {
      std::lock_guard<std::mutex> lock(mutex_);
      stuck_.push_back({std::exchange(lane, {}), streams});
    }
    throw;
  }
}

}  // namespace camem
