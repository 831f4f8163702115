// SPDX-License-Identifier: Apache-2.0
//
// Operators of the simulated device: the CPU's kernels, run on device memory in place.
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

// Waits for the device work that an operator called now is ordered after: what the framework has
// queued for the current stream, and the stream.
void drain(c10::Device device);

// A storage of the device as the CPU's kernels see it: the same bytes, or, of one in FRACTAL_NZ, a
// copy in the order of its elements. It does not keep the device's memory. Resizing it does not
// resize the original.
class StorageOnCpu {
 public:
  // Refuses a tensor over tiles that has another type than its storage.
  StorageOnCpu(const at::Tensor& over, bool resizable);

  const c10::Storage& storage() const { return storage_; }
  void read() const;                                // of tiles, before a kernel
  void write() const;                               // to tiles, behind a kernel that wrote
  npuSimRange range(const at::Tensor& over) const;  // of the device, that the tensor touches

 private:
  char* address_;
  std::optional<Tiling> tiling_;
  c10::Storage storage_;
};

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key);

// A device tensor as the CPU's kernels see it.
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

// Whether the current stream keeps its work for a graph instead of doing it.
bool is_recording(c10::Device device);

// Leaves the kernel to the graph, which runs it over the ranges of device memory.
void record(const std::string& name, c10::Device device, const std::vector<npuSimRange>& ranges,
            std::function<void()> kernel);

// Runs the kernel now, behind what the stream has to do, or records it.
void launch(const std::string& name, c10::Device device, const std::vector<Operand>& read,
            const std::vector<Operand>& written, std::function<void()> kernel);

// Lets parallel regions of this thread use all cores, if wanted, whatever the thread count is set
// to.
class AllCores {
 public:
  explicit AllCores(bool wanted = true);
  ~AllCores();
  AllCores(const AllCores&) = delete;
  AllCores& operator=(const AllCores&) = delete;

 private:
  int before_;  // threads, 0: nothing was changed
};

// Below this many elements more threads do not pay.
constexpr int64_t kParallelElements = 1 << 15;

// Makes the CPU generator that stands for the device's in one call of an operator, by which the
// device's advances. Of a call that is recorded, it makes another one each time.
struct GeneratorForCall {
  std::function<at::Generator()> make;
  std::vector<npuSimRange> ranges;  // of device memory, where a graph finds its state
};
GeneratorForCall generator_for_call(std::optional<at::Generator> generator, c10::Device device);

// Makes the CPU serve the operator's calls on the device.
void install_cpu_kernel(const c10::OperatorHandle& op);

// Keeps a kernel registered until the process ends.
void install(const c10::OperatorHandle& op, c10::DispatchKey key, c10::KernelFunction kernel);

void install_copies();
void install_products();
void install_casts();

}  // namespace sim::operators

// Lets the operator's kernel of the CPU serve its calls on the device. The name may end with a dot
// and an overload. Not 0: it has none.
extern "C" NPU_SIM_EXPORT int npuSimServeOnCpu(const char* full_name);
