// SPDX-License-Identifier: Apache-2.0
#include "control.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "context.h"
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
  for (auto& [address, range] : sim::memory().host) {
    (range.is_registered ? counters->registeredBytes : counters->pinnedBytes) += range.bytes;
  }
}

int npuSimSetFaults(const char* rules) { return sim::faults::set(rules) ? 0 : 1; }

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

size_t npuSimCommunicatorBufferBytes() { return sim::settings().hccl_buffer_bytes; }

}  // extern "C"
