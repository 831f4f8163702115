// SPDX-License-Identifier: Apache-2.0
//
// When a kernel runs: at once, in the thread that launches it, or in a graph.
#include <ATen/core/LegacyTypeDispatch.h>
#include <Python.h>
#include <acl/acl.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <memory>
#include <utility>

#include "operators/operators.h"

namespace sim::operators {
namespace {

// The current stream, after the framework's queue has been flushed.
aclrtStream current_stream(c10::Device device) {
  return c10_npu::getCurrentNPUStream(device.index()).stream();
}

struct Kernel {
  std::string name;
  std::function<void()> run;
};

// If an operator throws while it runs on the device, hardware reports an exception of its cores.
int run_kernel(void* argument) {
  auto* kernel = static_cast<Kernel*>(argument);
  try {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    kernel->run();
    return ACL_SUCCESS;
  } catch (const c10::Error& error) {
    return npuSimFail(ACL_ERROR_RT_AICORE_EXCEPTION,
                      (kernel->name + ": " + error.what_without_backtrace()).c_str());
  } catch (const std::exception& error) {
    return npuSimFail(ACL_ERROR_RT_AICORE_EXCEPTION, (kernel->name + ": " + error.what()).c_str());
  }
}

// Kernels written in Python need the GIL, which a waiting thread may hold. On hardware no kernel
// needs it.
void* release_gil() {
  return Py_IsInitialized() != 0 && PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr;
}

void take_gil(void* held) {
  if (held != nullptr) PyEval_RestoreThread(static_cast<PyThreadState*>(held));
}

constexpr npuSimWaitHooks kHooks = {release_gil, take_gil};
const bool hooked = (npuSimSetWaitHooks(&kHooks), true);

}  // namespace

void drain(c10::Device device) {
  TORCH_CHECK(npuSimDrain(current_stream(device)) == 0, aclGetRecentErrMsg());
}

bool is_recording(c10::Device device) { return npuSimKeepsWork(current_stream(device)) != 0; }

void record(const std::string& name, c10::Device device, const std::vector<npuSimRange>& ranges,
            std::function<void()> kernel) {
  auto release = [](void* argument) { delete static_cast<Kernel*>(argument); };
  const npuSimKernel launched = {
      .name = name.c_str(),
      .argument = new Kernel{name, std::move(kernel)},
      .run = run_kernel,
      .launched = nullptr,
      .skip = nullptr,
      .release = release,
  };
  aclError error = npuSimLaunch(current_stream(device), &launched, ranges.data(), ranges.size());
  TORCH_CHECK(error == ACL_SUCCESS, aclGetRecentErrMsg());
}

void launch(const std::string& name, c10::Device device, const std::vector<Operand>& read,
            const std::vector<Operand>& written, std::function<void()> kernel) {
  auto run = [=, kernel = std::move(kernel)] {
    for (const Operand& operand : read) operand.storage().read();
    for (const Operand& operand : written) operand.storage().read();
    kernel();
    for (const Operand& operand : written) operand.storage().write();
  };
  if (!is_recording(device)) {
    drain(device);
    run();
    return;
  }
  std::vector<npuSimRange> ranges;
  for (const Operand& operand : read) ranges.push_back(operand.range());
  for (const Operand& operand : written) ranges.push_back(operand.range());
  record(name, device, ranges, run);
}

}  // namespace sim::operators
