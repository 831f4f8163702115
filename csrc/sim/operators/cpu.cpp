// SPDX-License-Identifier: Apache-2.0
//
// Runs any operator on the CPU over device memory: arguments become CPU tensors that alias the
// device's memory, and results become device tensors. If the stream captures, the call is added to
// the graph, and the operator's meta kernel gives the sizes of its results.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <thread>

#include "operators/aliases.h"
#include "operators/cost.h"

extern "C" int omp_get_max_threads();
extern "C" void omp_set_num_threads(int);

namespace sim::operators {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;

// What an operator's schema says about its arguments.
struct Shape {
  explicit Shape(const c10::FunctionSchema& schema) {
    name = schema.operator_name().name;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const c10::Argument& argument = schema.arguments()[i];
      const auto* aliasing = argument.alias_info();
      if (aliasing != nullptr && aliasing->isWrite()) writes = true;
      if (argument.name() == "generator") generator = static_cast<int>(i);
      if (argument.name() == "device") device = static_cast<int>(i);
    }
    returns = !schema.returns().empty();
    // Indices and the sources of copies may be on another device than the tensor itself.
    mixes_devices = name.find("index") != std::string::npos || name == "aten::where";
  }

  std::string name;
  bool writes = false;
  bool returns = false;
  bool mixes_devices = false;
  int generator = -1;
  int device = -1;
};

template <typename Function>
void each_tensor(const IValue& value, Function function) {
  if (value.isTensor()) {
    function(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) function(tensor);
  }
}

// Applies the function to every tensor on the stack, also in lists.
template <typename Function>
void replace_tensors(Stack& stack, Function function) {
  for (IValue& value : stack) {
    if (value.isTensor()) {
      value = function(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list = value.toTensorList();
      for (size_t i = 0; i < list.size(); ++i) list.set(i, function(list.get(i)));
    }
  }
}

void run_on_cpu(const c10::OperatorHandle& op, Stack& stack, bool is_large) {
  AllCores cores(is_large);
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
}

void copy_bytes(const at::Tensor& to, const at::Tensor& from) {
  if (from.numel() == 0 || to.data_ptr() == from.data_ptr()) return;
  std::memcpy(to.data_ptr(), from.const_data_ptr(), from.numel() * from.element_size());
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, const Shape& shape, const Launch& launch, Stack& stack)
      : op_(op), shape_(shape), launch_(launch), stack_(stack) {
    find_device();
  }

  void run() {
    if (!device_.has_value()) {
      run_on_cpu(op_, stack_, is_large());
      return;
    }
    launch_.start(*device_, stack_);
    if (is_recording(*device_)) {
      run_in_graph();
    } else {
      run_now();
    }
  }

 private:
  bool is_large() const { return elements_ >= kParallelElements; }

  void run_now() {
    drain(*device_);
    Aliases aliases(DispatchKey::CPU, shape_.writes);
    aliases.replace(stack_);
    aliases.read();
    name_device(c10::kCPU);
    if (has_generator_of_device()) {
      stack_[shape_.generator] = generator_for_call(given_generator(), *device_).make();
    }
    run_on_cpu(op_, stack_, is_large());
    if (shape_.writes) {
      aliases.write();
      for (const auto& [original, alias, data] : aliases.follow_resizes()) {
        copy_bytes(original, alias);
      }
    }
    replace_tensors(stack_, [&](const at::Tensor& result) { return back(aliases, result); });
  }

  // Results have the meta kernel's sizes; the CPU kernel runs when the graph executes.
  void run_in_graph() {
    if (needs_host_memory()) drain(*device_);  // for a copy, which a capture refuses
    Stack results = results_of_graph();
    replace_tensors(stack_, keep_number);
    Aliases aliases(DispatchKey::CPU, false);
    aliases.replace(stack_);
    name_device(c10::kCPU);
    GeneratorForCall generator;
    if (has_generator_of_device()) generator = generator_for_call(given_generator(), *device_);

    Stack written = results;
    Aliases outputs(DispatchKey::CPU, false);
    outputs.replace(written);
    std::vector<npuSimRange> ranges = aliases.ranges();
    for (const npuSimRange& range : outputs.ranges()) ranges.push_back(range);
    for (const npuSimRange& range : generator.ranges) ranges.push_back(range);
    record(shape_.name, *device_, ranges,
           [op = op_, shape = shape_, arguments = stack_, storages = aliases.storages(), written,
            generator = generator.make, is_large = is_large()] {
             Stack stack = arguments;
             for (const StorageOnCpu& storage : storages) storage.read();
             if (generator) stack[shape.generator] = generator();
             run_on_cpu(op, stack, is_large);
             put(stack, written);
             if (!shape.writes) return;
             for (const StorageOnCpu& storage : storages) storage.write();
           });
    stack_ = std::move(results);
  }

  Stack results_of_graph() {
    if (!shape_.returns) return {};
    TORCH_CHECK(op_.hasComputedKernelForDispatchKey(DispatchKey::Meta), shape_.name,
                " cannot be captured: it has no meta kernel, which tells the sizes of its results");
    Stack stack = stack_;
    Aliases aliases(DispatchKey::Meta, true);
    aliases.replace(stack);
    if (shape_.device >= 0) stack[shape_.device] = c10::Device(c10::kMeta);
    if (shape_.generator >= 0) stack[shape_.generator] = IValue();
    op_.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &stack);
    if (shape_.writes) aliases.follow_resizes();
    replace_tensors(stack, [&](const at::Tensor& result) {
      if (!result.defined() || !result.is_meta()) return result;
      at::Tensor original = aliases.original_of(result);
      return original.defined() ? original : like(result);
    });
    return stack;
  }

  bool needs_host_memory() const {
    bool needed = false;
    auto note = [&](const at::Tensor& tensor) {
      needed = needed || (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0);
    };
    for (const IValue& value : stack_) {
      each_tensor(value, note);
      if (!value.isList() || value.isTensorList()) continue;
      for (const IValue& element : value.toListRef()) {
        needed = needed || (element.isTensor() && element.toTensor().is_cpu());
      }
    }
    return needed;
  }

  // A host scalar is an argument of the kernel, which the graph keeps.
  static at::Tensor keep_number(const at::Tensor& argument) {
    if (!argument.defined() || !argument.is_cpu()) return argument;
    at::Tensor number = argument.clone();
    bool is_wrapped = argument.unsafeGetTensorImpl()->is_wrapped_number();
    number.unsafeGetTensorImpl()->set_wrapped_number(is_wrapped);
    return number;
  }

  // Copies the results to the memory that the graph has for them.
  static void put(const Stack& results, const Stack& written) {
    for (size_t i = 0; i < written.size(); ++i) {
      std::vector<at::Tensor> from, to;
      each_tensor(results[i], [&](const at::Tensor& tensor) { from.push_back(tensor); });
      each_tensor(written[i], [&](const at::Tensor& tensor) { to.push_back(tensor); });
      TORCH_CHECK(from.size() == to.size(), "as many results as the meta kernel said, not ",
                  from.size());
      for (size_t j = 0; j < to.size(); ++j) {
        if (!to[j].defined() || to[j].numel() == 0 || to[j].data_ptr() == from[j].data_ptr()) {
          continue;
        }
        to[j].copy_(from[j]);
      }
    }
  }

  void find_device() {
    for (const IValue& value : stack_) {
      each_tensor(value, [&](const at::Tensor& tensor) { note_device(tensor); });
    }
    if (shape_.device >= 0 && stack_[shape_.device].isDevice()) {
      note_device_option(stack_[shape_.device].toDevice());
    }
    if (device_.has_value() && on_cpu_.defined() && !shape_.mixes_devices) {
      TORCH_CHECK(false,
                  "Expected all tensors to be on the same device, but found at least two "
                  "devices, ",
                  *device_, " and cpu! (", shape_.name, ")");
    }
  }

  void note_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == kDevice) {
      TORCH_CHECK(!device_.has_value() || *device_ == tensor.device() || shape_.mixes_devices,
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  *device_, " and ", tensor.device(), "! (", shape_.name, ")");
      if (!device_.has_value()) device_ = tensor.device();
      elements_ = std::max(elements_, tensor.numel());
    } else if (tensor.device().is_cpu() && tensor.dim() > 0) {
      on_cpu_ = tensor;
    }
  }

  void note_device_option(c10::Device wanted) {
    if (wanted.type() == kDevice) {
      device_ = wanted.has_index() ? wanted : c10::Device(kDevice, current_device());
      elements_ = kParallelElements;  // unknown for a factory
    } else {
      stays_on_cpu_ = true;
    }
  }

  static c10::DeviceIndex current_device() {
    return c10::impl::getDeviceGuardImpl(kDevice)->getDevice().index();
  }

  void name_device(c10::Device device) {
    if (shape_.device >= 0) stack_[shape_.device] = device;
  }

  std::optional<at::Generator> given_generator() const {
    const IValue& value = stack_[shape_.generator];
    return value.isGenerator() ? std::optional(value.toGenerator()) : std::nullopt;
  }

  bool has_generator_of_device() const {
    if (shape_.generator < 0) return false;
    std::optional<at::Generator> given = given_generator();
    return !given.has_value() || !given->device().is_cpu();
  }

  at::Tensor back(const Aliases& aliases, const at::Tensor& result) const {
    if (!result.defined() || !result.device().is_cpu()) return result;
    at::Tensor original = aliases.original_of(result);
    if (original.defined()) return original;
    if (stays_on_cpu_ || result.is_same(on_cpu_)) return result;
    bool dense = result.is_non_overlapping_and_dense();
    at::Tensor source = dense ? result : result.contiguous();
    at::Tensor moved = like(source);
    copy_bytes(moved, source);
    if (result.unsafeGetTensorImpl()->is_wrapped_number()) {
      moved.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return moved;
  }

  at::Tensor like(const at::Tensor& result) const {
    auto options = result.options().device(*device_).pinned_memory(false);
    return at::empty_strided(result.sizes(), result.strides(), options);
  }

  const c10::OperatorHandle& op_;
  const Shape& shape_;
  const Launch& launch_;
  Stack& stack_;
  std::optional<c10::Device> device_;
  at::Tensor on_cpu_;
  bool stays_on_cpu_ = false;
  int64_t elements_ = 0;
};

class CpuKernel final : public c10::OperatorKernel {
 public:
  explicit CpuKernel(const c10::OperatorHandle& op)
      : shape_(op.schema()), cost_(op), arguments_(op.schema().arguments().size()) {}

  void operator()(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
    size_t base = stack->size() - arguments_;
    // The stack may hold other values below the results.
    Stack own(std::make_move_iterator(stack->begin() + base),
              std::make_move_iterator(stack->end()));
    stack->resize(base);
    const Launch launch(cost_);
    Call(op, shape_, launch, own).run();
    for (IValue& value : own) stack->push_back(std::move(value));
  }

 private:
  const Shape shape_;
  const Cost cost_;
  const size_t arguments_;
};

}  // namespace

AllCores::AllCores(bool wanted) : before_(wanted ? omp_get_max_threads() : 0) {
  static const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (wanted && before_ != all) omp_set_num_threads(all);
}

AllCores::~AllCores() {
  if (before_ != 0) omp_set_num_threads(before_);
}

void install_cpu_kernel(const c10::OperatorHandle& op) {
  install(op, DispatchKey::PrivateUse1,
          c10::KernelFunction::makeFromBoxedFunctor<CpuKernel>(std::make_unique<CpuKernel>(op)));
}

}  // namespace sim::operators

extern "C" int npuSimServeOnCpu(const char* full_name) {
  std::string name = full_name;
  size_t dot = name.find('.');
  std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  auto op = c10::Dispatcher::singleton().findSchema({name.substr(0, dot), overload});
  if (!op.has_value() || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return 1;
  sim::operators::install_cpu_kernel(*op);
  return 0;
}
