// SPDX-License-Identifier: Apache-2.0
//
// Operators of the simulated device: the CPU's kernels, run on device memory in place.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace sim::operators {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// Waits for the device work that an operator called now is ordered after: what the framework has
// queued for the current stream, and the stream.
void drain(c10::Device device);

// The same memory, seen as a tensor of the CPU. Resizing it does not resize the original. Of a
// tensor that lies in tiles a copy in the order of its elements: what was written to it has to be
// put back.
at::Tensor alias_on_cpu(const at::Tensor& tensor);
void put_back(const at::Tensor& tensor, const at::Tensor& alias);

// Whether the storage is in FRACTAL_NZ, whatever the tensor over it looks like.
bool is_tiled(const at::Tensor& tensor);
// Its content in the order of the elements. Refuses a tensor of another type than the storage's.
c10::Storage untiled(const at::Tensor& tensor);
void tile_back(const at::Tensor& tensor, const c10::Storage& content);

// Lets parallel regions of this thread use all cores, whatever the thread count is set to.
class AllCores {
 public:
  AllCores();
  ~AllCores();
  AllCores(const AllCores&) = delete;
  AllCores& operator=(const AllCores&) = delete;

 private:
  int before_;
};

// Below this many elements more threads do not pay.
constexpr int64_t kParallelElements = 1 << 15;

// The CPU generator that stands for the device's in one operator, whose offset advances.
at::Generator generator_for_call(std::optional<at::Generator> generator, c10::Device device);

// Makes the CPU serve the operator's calls on the device.
void install_cpu_kernel(const c10::OperatorHandle& op);

// Keeps a kernel registered until the process ends.
void install(const c10::OperatorHandle& op, c10::DispatchKey key, c10::KernelFunction kernel);

void install_copies();
void install_products();
void install_casts();

}  // namespace sim::operators
