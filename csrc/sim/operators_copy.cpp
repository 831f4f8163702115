// SPDX-License-Identifier: Apache-2.0
//
// Copies. Between host and device the framework's own kernel runs, so that the runtime sees the
// copy, its direction and its stream; everything that also converts or rearranges runs on the CPU.
#include <ATen/ops/_to_copy_native.h>

#include "operators.h"

namespace sim::operators {
namespace {

const c10::SafeKernelFunction* framework_copy = nullptr;

bool is_on_device(const at::Tensor& tensor) { return tensor.device().type() == kDevice; }

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

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.numel() == 0 || to.is_same(from)) return to;
  bool crosses = is_on_device(to) != is_on_device(from);
  if (crosses && is_plain(to, from)) {
    copy_with_framework(to, from, non_blocking);
    return to;
  }
  if (is_on_device(to)) drain(to.device());
  if (is_on_device(from)) drain(from.device());
  at::Tensor target = is_on_device(to) ? alias_on_cpu(to) : to;
  at::Tensor source = is_on_device(from) ? alias_on_cpu(from) : from;
  if (to.numel() >= kParallelElements) {
    AllCores cores;
    target.copy_(source);
  } else {
    target.copy_(source);
  }
  if (is_on_device(to)) put_back(to, target);
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
