// SPDX-License-Identifier: Apache-2.0
//
// Operators in the framework's own namespace that ordinary code calls.
#include "operators/operators.h"

namespace sim::operators {
namespace {

at::Tensor cast(const at::Tensor& self, at::ScalarType type) { return self.to(type); }

at::Tensor& cast_(at::Tensor& self, const at::Tensor& source) { return self.copy_(source); }

template <typename Function>
void install_kernel(const char* name, Function function) {
  auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!op.has_value()) return;
  install(*op, c10::DispatchKey::PrivateUse1,
          c10::KernelFunction::makeFromUnboxedFunction(function));
}

}  // namespace

void install_casts() {
  install_kernel("npu::npu_dtype_cast", TORCH_FN(cast));
  install_kernel("npu::_npu_dtype_cast", TORCH_FN(cast));
  install_kernel("npu::npu_dtype_cast_", TORCH_FN(cast_));
}

}  // namespace sim::operators
