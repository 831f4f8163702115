// SPDX-License-Identifier: Apache-2.0
#include "control.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "captures.h"
#include "context.h"
#include "error.h"
#include "faults.h"
#include "machine.h"
#include "memory.h"
#include "settings.h"

extern "C" {

void npuSimGetCounters(npuSimCounters* counters) {
  *counters = {};
  for (int device : sim::settings().visible) {
    counters->deviceBytes += sim::machine::taken_by_this_process(device);
  }
  counters->physicalHandles = sim::physicals().size();
  counters->streams = sim::streams().size();
  counters->events = sim::events().size();
  std::lock_guard<std::mutex> lock(sim::memory().mutex);
  for (auto& [address, reservation] : sim::memory().reservations) {
    ++(reservation.is_malloc ? counters->allocations : counters->reservations);
  }
  counters->mappings = sim::memory().mappings.size() - counters->allocations;
  for (auto& [address, block] : sim::memory().pinned) counters->pinnedBytes += block.bytes;
  for (auto& [address, range] : sim::memory().registered) {
    counters->registeredBytes += range.bytes;
  }
}

int npuSimSetFaults(const char* rules) { return sim::faults::set(rules) ? 0 : 1; }

uint64_t npuSimFaultHits(void) { return sim::faults::hits(); }

uint64_t npuSimCallCount(const char* name) { return sim::faults::count(name); }
void npuSimResetCounters() { sim::faults::reset_counts(); }

void npuSimKeepCallLog(int on) { sim::faults::keep_log(on != 0); }

size_t npuSimCallLog(char* log, size_t room) {
  std::string text = sim::faults::log();
  if (room > 0) {
    size_t length = std::min(text.size(), room - 1);
    std::memcpy(log, text.data(), length);
    log[length] = '\0';
  }
  return text.size();
}

aclError npuSimDrain(aclrtStream handle) {
  std::shared_ptr<sim::Stream> stream = sim::streams().find(handle);
  if (stream == nullptr) {
    if (aclError error = sim::find_stream("simulated operator", handle, &stream)) return error;
  }
  if (aclError error = sim::refuse_recording("simulated operator", *stream)) return error;
  sim::device::synchronize(stream->queue, -1);
  return ACL_SUCCESS;
}

int npuSimEnterCall(const char* name) {
  static std::mutex mutex;
  static auto* calls = new std::map<std::string, sim::faults::Call>;
  std::unique_lock<std::mutex> lock(mutex);
  sim::faults::Call& call = calls->try_emplace(name, name).first->second;
  lock.unlock();
  return call.enter();
}

int npuSimFail(int code, const char* message) { return sim::fail(code, "%s", message); }

aclError npuSimLaunch(aclrtStream handle, int (*function)(void*), void* argument,
                      const npuSimRange* ranges, size_t count) {
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream("simulated library", handle, &stream)) return error;
  if (aclError error = sim::refuse_recording("simulated library", *stream)) return error;
  for (size_t i = 0; i < count; ++i) {
    SIM_REQUIRE(ranges[i].bytes == 0 || sim::is_device_range(ranges[i].begin, ranges[i].bytes),
                ACL_ERROR_RT_PARAM_INVALID,
                "simulated library: [%p, +%zu) is not mapped device memory", ranges[i].begin,
                ranges[i].bytes);
  }
  struct Launch {
    int (*function)(void*);
    void* argument;
    sim::Context* context;
  };
  auto run = [](void* argument) {
    std::unique_ptr<Launch> launch(static_cast<Launch*>(argument));
    if (int code = launch->function(launch->argument)) launch->context->fail(code);
  };
  uint64_t ticket =
      sim::device::submit_call(stream->queue, run, new Launch{function, argument, stream->context});
  for (size_t i = 0; i < count; ++i) {
    if (ranges[i].bytes > 0) stream->note_use(ticket, ranges[i].begin, ranges[i].bytes);
  }
  return ACL_SUCCESS;
}

uint64_t npuSimDeviceKey() {
  sim::Context* context = sim::current_context();
  if (context == nullptr) return 0;
  std::string device = sim::settings().state_directory + ":" + std::to_string(context->physical);
  return std::hash<std::string>()(device) | 1;
}

size_t npuSimCommunicatorBufferBytes(size_t bytes) {
  int64_t setting = sim::settings().hccl_buffer_bytes;
  return setting < 0 ? bytes : static_cast<size_t>(setting);
}

}  // extern "C"
