// SPDX-License-Identifier: Apache-2.0
//
// When the library is loaded, decides for each operator what runs its calls on the device.
#include "operators/operators.h"

#include <c10/util/Exception.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

namespace sim::operators {
namespace {

using c10::DispatchKey;
using c10::OperatorHandle;

// A backend without kernels: it runs the operator's composite form.
constexpr auto kUnusedBackend = DispatchKey::XLA;

// Allocation, views and metadata: the framework's own kernels only use addresses and sizes.
bool is_native(const std::string& name) {
  static const std::set<std::string> native = {"as_strided",
                                               "as_strided_",
                                               "view",
                                               "_reshape_alias",
                                               "squeeze",
                                               "squeeze.dim",
                                               "unsqueeze",
                                               "unfold",
                                               "view_as_complex",
                                               "view_as_real",
                                               "set_",
                                               "set_.source_Storage",
                                               "set_.source_Storage_storage_offset",
                                               "set_.source_Tensor",
                                               "resize_",
                                               "resize_as_",
                                               "empty.memory_format",
                                               "empty_like",
                                               "empty_strided",
                                               "new_empty_strided",
                                               "is_pinned",
                                               "_pin_memory",
                                               "record_stream",
                                               "is_set_to",
                                               "_lazy_clone",
                                               "_copy_from_and_resize",
                                               "to_padded_tensor",
                                               "_fused_sdp_choice",
                                               "_has_compatible_shallow_copy_type"};
  return native.count(name) != 0;
}

bool starts_with_any(const std::string& name, std::initializer_list<const char*> prefixes) {
  for (const char* prefix : prefixes) {
    if (name.rfind(prefix, 0) == 0) return true;
  }
  return false;
}

// CPU kernels that create kinds of tensors which the device does not have.
bool is_foreign(const std::string& name) {
  return starts_with_any(
      name, {"_nested", "quantize", "quantized", "mkldnn", "to_mkldnn", "_empty",
             "_efficientzerotensor", "from_file", "_to_sparse", "_make_per", "_test", "_foobar"});
}

// Runs the operator's kernel of another dispatch key.
class Forward final : public c10::OperatorKernel {
 public:
  Forward(const OperatorHandle& op, DispatchKey key)
      : kernel_(op.getComputedKernelForDispatchKey(key)) {}

  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    kernel_.callBoxed(op, keys, stack);
  }

 private:
  c10::SafeKernelFunction kernel_;
};

void install_forward(const OperatorHandle& op, DispatchKey from, DispatchKey to) {
  install(op, from,
          c10::KernelFunction::makeFromBoxedFunctor<Forward>(std::make_unique<Forward>(op, to)));
}

void install_for(const OperatorHandle& op, const std::string& name) {
  bool on_device = op.hasKernelForDispatchKey(DispatchKey::PrivateUse1);
  bool is_composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
  bool gradient_on_device = op.hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1);
  if (is_composite) {
    if (on_device) {
      install_forward(op, DispatchKey::PrivateUse1, kUnusedBackend);
    }
    if (gradient_on_device) {
      install_forward(op, DispatchKey::AutogradPrivateUse1, kUnusedBackend);
    }
    return;
  }
  if (!op.hasComputedKernelForDispatchKey(DispatchKey::CPU)) return;
  bool only_on_cpu =
      op.hasKernelForDispatchKey(DispatchKey::CPU) && !on_device &&
      !op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) &&
      !op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional);
  if (on_device || (only_on_cpu && !is_foreign(name))) {
    install_cpu_kernel(op);
  }
  // The framework's own gradient formulas call CANN operators; those of other devices do not.
  if (gradient_on_device) {
    install_forward(op, DispatchKey::AutogradPrivateUse1, DispatchKey::AutogradCPU);
  }
}

// Replacing the framework's kernels is the purpose of this library.
class NoWarnings : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

struct Installed {
  Installed() {
    NoWarnings quiet;
    c10::WarningUtils::WarningHandlerGuard guard(&quiet);
    install_copies();
    install_products();
    install_casts();
    static const std::set<std::string> done = {"copy_",   "_to_copy",    "mm",     "mm.out",
                                               "addmm",   "addmm.out",   "bmm",    "bmm.out",
                                               "baddbmm", "baddbmm.out", "addmm_", "baddbmm_"};
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const c10::OperatorName& full : dispatcher.getAllOpNames()) {
      if (full.name.rfind("aten::", 0) != 0) continue;
      std::string name = full.name.substr(6);
      if (!full.overload_name.empty()) name += "." + full.overload_name;
      if (is_native(name) || done.count(name) != 0) continue;
      auto op = dispatcher.findSchema(full);
      if (op.has_value()) install_for(*op, name);
    }
  }
};

const Installed installed;

}  // namespace

void install(const c10::OperatorHandle& op, DispatchKey key, c10::KernelFunction kernel) {
  static auto* registrations = new std::vector<c10::RegistrationHandleRAII>;
  registrations->push_back(c10::Dispatcher::singleton().registerImpl(
      op.operator_name(), key, std::move(kernel), std::nullopt, nullptr, "simulated operator"));
}

}  // namespace sim::operators
