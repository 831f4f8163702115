// SPDX-License-Identifier: Apache-2.0
//
// Operators of the simulated device: CPU kernels that run in place on device memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "control.h"
#include "operators/tiles.h"

namespace sim::operators {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

inline bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDevice;
}

// Waits for all earlier work: what the framework has queued for the current stream, and the stream.
void drain(c10::Device device);

// A device storage as CPU kernels see it: the same bytes, or for FRACTAL_NZ a copy in the order of
// its elements. It does not keep the device's memory alive. Resizing it does not resize the
// original.
class StorageOnCpu {
 public:
  // Refuses a tensor in tiles with another type than its storage.
  StorageOnCpu(const at::Tensor& over, bool resizable);

  const c10::Storage& storage() const { return storage_; }
  void read() const;                                // from tiles, before a kernel
  void write() const;                               // to tiles, after a kernel has written
  npuSimRange range(const at::Tensor& over) const;  // the device memory that the tensor uses

 private:
  char* address_;
  std::optional<Tiling> tiling_;
  c10::Storage storage_;
};

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key);

// A device tensor as CPU kernels see it.
class Operand {
 public:
  explicit Operand(const at::Tensor& tensor);

  const at::Tensor& on_cpu() const { return on_cpu_; }
  const StorageOnCpu& storage() const { return storage_; }
  npuSimRange range() const { return storage_.range(on_cpu_); }

 private:
  StorageOnCpu storage_;
  at::Tensor on_cpu_;
};

// Whether the current stream adds its work to a graph.
bool is_recording(c10::Device device);

// Adds the kernel to the graph, which runs it on the ranges of device memory.
void record(const std::string& name, c10::Device device, const std::vector<npuSimRange>& ranges,
            std::function<void()> kernel);

// Runs the kernel now, after the stream's earlier work, or records it.
void launch(const std::string& name, c10::Device device, const std::vector<Operand>& read,
            const std::vector<Operand>& written, std::function<void()> kernel);

// Lets parallel regions of this thread use all cores, if wanted, regardless of the set thread
// count.
class AllCores {
 public:
  explicit AllCores(bool wanted = true);
  ~AllCores();
  AllCores(const AllCores&) = delete;
  AllCores& operator=(const AllCores&) = delete;

 private:
  int before_;  // the previous number of threads, or 0 if it was not changed
};

// With fewer elements, more threads are not faster.
constexpr int64_t kParallelElements = 1 << 15;

// Creates the CPU generator that replaces the device's in a call of an operator, and advances the
// device's. For a recorded call, it creates another one at each execution.
struct GeneratorForCall {
  std::function<at::Generator()> make;
  std::vector<npuSimRange> ranges;  // device memory in which a graph finds the generator's state
};
GeneratorForCall generator_for_call(std::optional<at::Generator> generator, c10::Device device);

// Runs the operator's calls on the device with its CPU kernel.
void install_cpu_kernel(const c10::OperatorHandle& op);

// Keeps a kernel registered until the process ends.
void install(const c10::OperatorHandle& op, c10::DispatchKey key, c10::KernelFunction kernel);

void install_copies();
void install_products();
void install_casts();

}  // namespace sim::operators

// Runs the operator's calls on the device with its CPU kernel. The name may end with a dot and an
// overload. Not 0 if it has no CPU kernel.
extern "C" NPU_SIM_EXPORT int npuSimServeOnCpu(const char* full_name);
