// SPDX-License-Identifier: Apache-2.0
//
// Copies. Between host and device the framework's own kernel runs, so that the runtime gets the
// copy with its direction and stream. Copies that also convert or rearrange run on the CPU.
#include <ATen/ops/_to_copy_native.h>

#include "operators/cost.h"
#include "operators/operators.h"

namespace sim::operators {
namespace {

const c10::SafeKernelFunction* framework_copy = nullptr;

bool is_plain(const at::Tensor& to, const at::Tensor& from) {
  return to.scalar_type() == from.scalar_type() && to.sizes().equals(from.sizes()) &&
         to.is_contiguous() && from.is_contiguous() && to.is_conj() == from.is_conj() &&
         to.is_neg() == from.is_neg() && !to.is_complex();
}

void copy_with_framework(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  torch::jit::Stack stack = {c10::IValue(to), c10::IValue(from), c10::IValue(non_blocking)};
  framework_copy->callBoxed(framework_copy->opHandle(),
                            c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), &stack);
}

void copy_on_cpu(const at::Tensor& to, const at::Tensor& from) {
  AllCores cores(to.numel() >= kParallelElements);
  to.copy_(from);
}

void copy_on_device(const at::Tensor& to, const at::Tensor& from) {
  if (from.device() != to.device()) drain(from.device());
  const Operand target(to), source(from);
  launch("aten::copy_", to.device(), {source}, {target},
         [target, source] { copy_on_cpu(target.on_cpu(), source.on_cpu()); });
}

// Converts on the host, so it waits.
void copy_across(const at::Tensor& to, const at::Tensor& from) {
  const Operand device(is_on_device(to) ? to : from);
  drain(is_on_device(to) ? to.device() : from.device());
  device.storage().read();
  if (is_on_device(to)) {
    copy_on_cpu(device.on_cpu(), from);
    device.storage().write();
  } else {
    copy_on_cpu(to, device.on_cpu());
  }
}

// For a graph: converts on the device.
void record_copy_across(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (is_on_device(to)) {
    at::Tensor staged = at::empty(from.sizes(), from.options().device(to.device()));
    copy_with_framework(staged, from, non_blocking);
    copy_on_device(to, staged.expand(to.sizes()));
  } else {
    at::Tensor staged = at::empty(to.sizes(), to.options().device(from.device()));
    copy_on_device(staged, from.expand(to.sizes()));
    copy_with_framework(to, staged, non_blocking);
  }
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.numel() == 0 || to.is_same(from)) return to;
  const bool crosses = is_on_device(to) != is_on_device(from);
  if (crosses && is_plain(to, from)) {
    copy_with_framework(to, from, non_blocking);
    return to;
  }
  const CopyLaunch launch(to, from, non_blocking);
  if (!crosses) {
    copy_on_device(to, from);
  } else if (is_recording(is_on_device(to) ? to.device() : from.device())) {
    record_copy_across(to, from, non_blocking);
  } else {
    copy_across(to, from);
  }
  return to;
}

at::Tensor to_copy(const at::Tensor& self, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout> layout, std::optional<at::Device> device,
                   std::optional<bool> pin_memory, bool non_blocking,
                   std::optional<at::MemoryFormat> memory_format) {
  return at::native::_to_copy(self, dtype, layout, device, pin_memory, non_blocking, memory_format);
}

}  // namespace

void install_copies() {
  auto& dispatcher = c10::Dispatcher::singleton();
  auto copy = dispatcher.findSchemaOrThrow("aten::copy_", "");
  framework_copy = new c10::SafeKernelFunction(
      copy.getComputedKernelForDispatchKey(c10::DispatchKey::PrivateUse1));
  install(copy, c10::DispatchKey::PrivateUse1,
          c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(copy_)));
  install(dispatcher.findSchemaOrThrow("aten::_to_copy", ""), c10::DispatchKey::PrivateUse1,
          c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(to_copy)));
}

}  // namespace sim::operators
