// SPDX-License-Identifier: Apache-2.0
//
// Counts the costs of operators. `operators/cost.*` knows the cost of each operator.
#include "costs.h"

#include <atomic>
#include <map>
#include <mutex>
#include <string>

#include "control.h"
#include "faults.h"

struct npuSimOperator final : sim::faults::Call {
  using Call::Call;
};

namespace {

std::atomic<uint64_t> launches{0};
std::atomic<uint64_t> on_ai_cpu_launches{0};
std::atomic<uint64_t> copy_bytes{0};
thread_local int kernels = 0;  // running in this thread, nested

constexpr const char* kWaits[] = {"aclrtSynchronizeStream", "aclrtSynchronizeStreamWithTimeout",
                                  "aclrtSynchronizeEvent",  "aclrtSynchronizeEventWithTimeout",
                                  "aclrtSynchronizeDevice", "aclrtSynchronizeDeviceWithTimeout"};

}  // namespace

void sim::costs::reset() {
  launches = 0;
  on_ai_cpu_launches = 0;
  copy_bytes = 0;
}

extern "C" {

void npuSimGetCosts(npuSimCosts* costs) {
  *costs = {launches, on_ai_cpu_launches, copy_bytes, 0};
  for (const char* call : kWaits) costs->waits += sim::faults::count(call);
}

npuSimOperator* npuSimFindOperator(const char* name) {
  static std::mutex mutex;
  static auto* operators = new std::map<std::string, npuSimOperator>;
  std::lock_guard<std::mutex> lock(mutex);
  return &operators->try_emplace(name, name).first->second;
}

int npuSimEnterKernel() { return kernels++ == 0; }
void npuSimLeaveKernel() { --kernels; }

int npuSimCountLaunch(npuSimOperator* op, int on_ai_cpu, uint64_t hidden_copy_bytes) {
  if (int code = op->enter()) return code;
  launches.fetch_add(1, std::memory_order_relaxed);
  if (on_ai_cpu != 0) on_ai_cpu_launches.fetch_add(1, std::memory_order_relaxed);
  copy_bytes.fetch_add(hidden_copy_bytes, std::memory_order_relaxed);
  return 0;
}

}  // extern "C"
