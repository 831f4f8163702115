// SPDX-License-Identifier: Apache-2.0
//
// Streams of the host device: each is a queue with a thread that exists only while there is work,
// and a moment longer. Nothing is destroyed at the process's exit, because threads may still be
// running.
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "device.h"

namespace sim::device {
namespace {

constexpr auto kLinger = std::chrono::milliseconds(500);

uint64_t clock_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

template <typename Condition>
bool wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                int64_t timeout_ms, Condition condition) {
  if (timeout_ms < 0) {
    changed.wait(lock, condition);
    return true;
  }
  return changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), condition);
}

}  // namespace

struct Marker {
  mutable std::mutex mutex;
  mutable std::condition_variable changed;
  std::atomic<bool> reached{false};
  uint64_t at_ns = 0;

  void reach() {
    std::lock_guard<std::mutex> lock(mutex);
    at_ns = clock_ns();
    reached = true;
    changed.notify_all();
  }
};

struct Stream : std::enable_shared_from_this<Stream> {
  explicit Stream(int device) : device(device) {}

  const int device;
  std::mutex mutex;
  std::condition_variable has_work;
  std::condition_variable advanced;
  std::deque<std::function<void()>> work;
  std::atomic<uint64_t> submitted{0};
  std::atomic<uint64_t> completed{0};
  bool has_thread = false;
  std::shared_ptr<Stream> self;  // until destroy_stream

  bool idle() const { return completed == submitted; }

  uint64_t submit(std::function<void()> task) {
    std::lock_guard<std::mutex> lock(mutex);
    work.push_back(std::move(task));
    uint64_t ticket = ++submitted;
    if (has_thread) {
      has_work.notify_one();
    } else {
      has_thread = true;
      start_thread();
    }
    return ticket;
  }

 private:
  void start_thread() {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread([stream = shared_from_this()] { stream->run(); }).detach();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (has_work.wait_for(lock, kLinger, [this] { return !work.empty(); })) {
      std::function<void()> task = std::move(work.front());
      work.pop_front();
      lock.unlock();
      task();
      task = nullptr;
      lock.lock();
      ++completed;
      advanced.notify_all();
    }
    has_thread = false;
  }
};

Stream* create_stream(int device) {
  auto stream = std::make_shared<Stream>(device);
  stream->self = stream;
  return stream.get();
}

void destroy_stream(Stream* stream) { std::shared_ptr<Stream>().swap(stream->self); }

uint64_t submit_copy(Stream* stream, void* to, const void* from, size_t bytes,
                     Direction direction) {
  int device = stream->device;
  return stream->submit([=] { copy(device, to, from, bytes, direction); });
}

uint64_t submit_fill(Stream* stream, void* address, int value, size_t bytes) {
  int device = stream->device;
  return stream->submit([=] { fill(device, address, value, bytes); });
}

uint64_t submit_call(Stream* stream, void (*function)(void*), void* argument) {
  return stream->submit([=] { function(argument); });
}

uint64_t submitted(const Stream* stream) { return stream->submitted; }
uint64_t completed(const Stream* stream) { return stream->completed; }

bool synchronize(Stream* stream, int64_t timeout_ms) {
  if (stream->idle()) return true;
  std::unique_lock<std::mutex> lock(stream->mutex);
  uint64_t target = stream->submitted;
  return wait_until(stream->advanced, lock, timeout_ms,
                    [&] { return stream->completed >= target; });
}

std::shared_ptr<Marker> record(Stream* stream) {
  auto marker = std::make_shared<Marker>();
  if (stream->idle()) {
    marker->reach();
  } else {
    stream->submit([marker] { marker->reach(); });
  }
  return marker;
}

void wait(Stream* stream, std::shared_ptr<Marker> marker) {
  if (reached(*marker)) return;
  stream->submit([marker = std::move(marker)] { synchronize(*marker, -1); });
}

bool reached(const Marker& marker) { return marker.reached; }

bool synchronize(const Marker& marker, int64_t timeout_ms) {
  if (reached(marker)) return true;
  std::unique_lock<std::mutex> lock(marker.mutex);
  return wait_until(marker.changed, lock, timeout_ms, [&] { return marker.reached.load(); });
}

uint64_t nanoseconds(const Marker& marker) { return marker.at_ns; }

}  // namespace sim::device
