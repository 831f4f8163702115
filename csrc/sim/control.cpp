// SPDX-License-Identifier: Apache-2.0
#include "control.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "costs.h"
#include "error.h"
#include "faults.h"
#include "settings.h"
#include "state/captures.h"
#include "state/context.h"
#include "state/machine.h"
#include "state/memory.h"
#include "state/work.h"

namespace {

// A null handle is the default stream of the current context.
aclError find_any_stream(aclrtStream handle, std::shared_ptr<sim::Stream>* stream) {
  *stream = sim::streams().find(handle);
  return *stream != nullptr ? ACL_SUCCESS : sim::find_stream("simulated operator", handle, stream);
}

}  // namespace

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
void npuSimResetCounters() {
  sim::faults::reset_counts();
  sim::costs::reset();
}

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
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = find_any_stream(handle, &stream)) return error;
  if (aclError error = sim::refuse_captured("simulated operator", *stream)) return error;
  if (aclError error = sim::refuse_implicit("simulated operator", *stream)) return error;
  sim::wait(*stream, -1);
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

aclError npuSimLaunch(aclrtStream handle, const npuSimKernel* kernel, const npuSimRange* ranges,
                      size_t count) {
  auto release = [end = kernel->release](void* argument) {
    if (end != nullptr) end(argument);
  };
  std::shared_ptr<void> argument(kernel->argument, release);
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream(kernel->name, handle, &stream)) return error;
  sim::Work work;
  for (size_t i = 0; i < count; ++i) {
    if (ranges[i].bytes == 0) continue;
    SIM_REQUIRE(sim::is_device_range(ranges[i].begin, ranges[i].bytes), ACL_ERROR_RT_PARAM_INVALID,
                "%s: [%p, +%zu) is not mapped device memory", kernel->name, ranges[i].begin,
                ranges[i].bytes);
    work.ranges.push_back({ranges[i].begin, ranges[i].bytes, true});
  }
  work.run = [argument, run = kernel->run] { return run(argument.get()); };
  work.is_kernel = kernel->launched == nullptr;
  if (kernel->launched != nullptr) {
    work.launched = [argument, launched = kernel->launched] { launched(argument.get()); };
  }
  if (kernel->skip != nullptr) {
    work.skip = [argument, skip = kernel->skip] { skip(argument.get()); };
  }
  return sim::give(kernel->name, *stream, std::move(work));
}

int npuSimKeepsWork(aclrtStream handle) {
  std::shared_ptr<sim::Stream> stream;
  if (find_any_stream(handle, &stream) != ACL_SUCCESS) return 0;
  return sim::keeps_work(*stream) ? 1 : 0;
}

void npuSimFault(const char* message) { sim::fault("%s", message); }

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
