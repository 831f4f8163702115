// SPDX-License-Identifier: Apache-2.0
//
// Streams of the CUDA device: each is a CUDA stream. An event after each piece of work shows the
// stream's progress, so a check costs a query only while work is in flight.
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>

#include "device/cuda.h"

namespace sim::device {
namespace {

using cuda::require;

uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

// CUDA has no waits with a timeout. The timeout must not be negative here.
template <typename Condition>
bool poll(int64_t timeout_ms, Condition condition) {
  const uint64_t end = clock_ns() + static_cast<uint64_t>(timeout_ms) * 1000000u;
  while (!condition()) {
    if (clock_ns() >= end) return false;
    sched_yield();
  }
  return true;
}

}  // namespace

struct Marker {
  cudaEvent_t event = nullptr;
  cudaEvent_t base = nullptr;  // of the stream
  uint64_t base_ns = 0;

  ~Marker() { cudaEventDestroy(event); }
};

struct Stream {
  explicit Stream(int device) : device(device) {
    cuda::use(device);
    require(cudaStreamCreateWithFlags(&queue, cudaStreamNonBlocking), "cudaStreamCreate");
    require(cudaEventCreate(&base), "cudaEventCreate");
    require(cudaEventRecord(base, queue), "cudaEventRecord");
    base_ns = clock_ns();
  }

  const int device;
  cudaStream_t queue = nullptr;
  cudaEvent_t base = nullptr;  // reached at base_ns, before all work
  uint64_t base_ns = 0;
  std::atomic<uint64_t> submitted{0};
  std::atomic<uint64_t> completed{0};
  std::mutex mutex;
  struct Pending {
    uint64_t ticket;
    cudaEvent_t event;
  };
  std::deque<Pending> pending;
  std::deque<cudaEvent_t> spare;

  // Runs `launch` after what was submitted before, and records its event.
  template <typename Launch>
  uint64_t submit(const char* call, Launch launch) {
    std::lock_guard<std::mutex> lock(mutex);
    cuda::use(device);
    require(launch(), call);
    collect();
    cudaEvent_t event = nullptr;
    if (spare.empty()) {
      require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    } else {
      event = spare.front();
      spare.pop_front();
    }
    require(cudaEventRecord(event, queue), "cudaEventRecord");
    const uint64_t ticket = submitted + 1;
    pending.push_back({ticket, event});
    submitted = ticket;
    return ticket;
  }

  void collect() {  // the mutex must be held
    while (!pending.empty()) {
      const cudaError_t state = cudaEventQuery(pending.front().event);
      if (state == cudaErrorNotReady) return;
      require(state, "work of a stream");
      completed = pending.front().ticket;
      spare.push_back(pending.front().event);
      pending.pop_front();
    }
  }
};

Stream* create_stream(int device) { return new Stream(device); }

// CUDA finishes the work of a destroyed stream. The object is kept, because it may still be
// queried, and there are few.
void destroy_stream(Stream* stream) {
  cuda::use(stream->device);
  cudaStreamDestroy(stream->queue);
}

uint64_t submit_copy(Stream* stream, void* to, const void* from, size_t bytes,
                     Direction direction) {
  return stream->submit("cudaMemcpyAsync", [&] {
    return cudaMemcpyAsync(to, from, bytes, cuda::kind_of(direction), stream->queue);
  });
}

uint64_t submit_fill(Stream* stream, void* address, int value, size_t bytes) {
  return stream->submit("cudaMemsetAsync",
                        [&] { return cudaMemsetAsync(address, value, bytes, stream->queue); });
}

uint64_t submit_call(Stream* stream, void (*function)(void*), void* argument) {
  return stream->submit("cudaLaunchHostFunc",
                        [&] { return cudaLaunchHostFunc(stream->queue, function, argument); });
}

uint64_t submitted(const Stream* stream) { return stream->submitted; }

uint64_t completed(const Stream* constant) {
  auto* stream = const_cast<Stream*>(constant);
  if (stream->completed != stream->submitted) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->collect();
  }
  return stream->completed;
}

bool synchronize(Stream* stream, int64_t timeout_ms) {
  const uint64_t target = stream->submitted;
  if (stream->completed >= target) return true;
  if (timeout_ms >= 0) return poll(timeout_ms, [&] { return completed(stream) >= target; });
  cuda::use(stream->device);
  require(cudaStreamSynchronize(stream->queue), "cudaStreamSynchronize");
  completed(stream);
  return true;
}

std::shared_ptr<Marker> record(Stream* stream) {
  cuda::use(stream->device);
  auto marker = std::make_shared<Marker>();
  require(cudaEventCreate(&marker->event), "cudaEventCreate");
  marker->base = stream->base;
  marker->base_ns = stream->base_ns;
  require(cudaEventRecord(marker->event, stream->queue), "cudaEventRecord");
  return marker;
}

void wait(Stream* stream, std::shared_ptr<Marker> marker) {
  stream->submit("cudaStreamWaitEvent",
                 [&] { return cudaStreamWaitEvent(stream->queue, marker->event, 0); });
}

bool reached(const Marker& marker) { return cudaEventQuery(marker.event) == cudaSuccess; }

bool synchronize(const Marker& marker, int64_t timeout_ms) {
  if (timeout_ms >= 0) return poll(timeout_ms, [&] { return reached(marker); });
  require(cudaEventSynchronize(marker.event), "cudaEventSynchronize");
  return true;
}

uint64_t nanoseconds(const Marker& marker) {
  float milliseconds = 0;
  require(cudaEventElapsedTime(&milliseconds, marker.base, marker.event), "cudaEventElapsedTime");
  return marker.base_ns + static_cast<uint64_t>(std::max(milliseconds, 0.0f) * 1e6);
}

}  // namespace sim::device
