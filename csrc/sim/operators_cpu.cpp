// SPDX-License-Identifier: Apache-2.0
//
// Runs any operator on the CPU over device memory: arguments become tensors of the CPU that alias
// the device's memory, results become tensors of the device.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <thread>

#include "control.h"
#include "operators.h"

extern "C" int omp_get_max_threads();
extern "C" void omp_set_num_threads(int);

namespace sim::operators {
namespace {

using c10::IValue;
using torch::jit::Stack;

c10::Storage alias_storage(const c10::Storage& storage, bool resizable) {
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      resizable ? c10::GetAllocator(c10::kCPU) : nullptr, resizable);
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like) {
  c10::Storage shared = storage;
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU), like.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return alias;
}

bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDevice;
}

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
    // Indices and the sources of copies may lie elsewhere than the tensor itself.
    mixes_devices = name.find("index") != std::string::npos || name == "aten::where";
  }

  std::string name;
  bool writes = false;
  bool mixes_devices = false;
  int generator = -1;
  int device = -1;
};

// One call: the aliases made for it, and the way back.
class Call {
 public:
  Call(const Shape& shape, Stack& stack) : shape_(shape), stack_(stack) {}

  void to_cpu() {
    find_device();
    if (!device_.has_value()) return;
    drain(*device_);
    for (IValue& value : stack_) {
      if (value.isTensor()) {
        if (is_on_device(value.toTensor())) value = alias(value.toTensor());
      } else if (value.isTensorList()) {
        value = alias_all(value.toTensorList());
      } else if (value.isList()) {
        alias_optionals(value);
      }
    }
    if (shape_.device >= 0) stack_[shape_.device] = c10::Device(c10::kCPU);
    if (shape_.generator >= 0) replace_generator(stack_[shape_.generator]);
  }

  bool is_large() const { return elements_ >= kParallelElements; }

  void to_device() {
    if (!device_.has_value()) return;
    if (shape_.writes) put_tiles_back();
    if (shape_.writes) follow_resizes();
    for (IValue& value : stack_) {
      if (value.isTensor()) {
        value = back(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list = value.toTensorList();
        for (size_t i = 0; i < list.size(); ++i) list.set(i, back(list.get(i)));
      }
    }
  }

 private:
  struct Alias {
    at::Tensor original;
    at::Tensor on_cpu;
    void* data;
  };
  struct StoragePair {
    c10::StorageImpl* original;
    c10::Storage on_cpu;
    at::Tensor tiled;  // the original, if it is: `on_cpu` is then a copy
  };

  void find_device() {
    for (const IValue& value : stack_) {
      if (value.isTensor()) {
        note_device(value.toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) note_device(tensor);
      }
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
      elements_ = kParallelElements;  // a factory: unknown, threads decide by themselves
    } else {
      stays_on_cpu_ = true;
    }
  }

  static c10::DeviceIndex current_device() {
    return c10::impl::getDeviceGuardImpl(kDevice)->getDevice().index();
  }

  at::Tensor alias(const at::Tensor& original) {
    for (const Alias& known : aliases_) {
      if (known.original.is_same(original)) return known.on_cpu;
    }
    c10::StorageImpl* storage = original.storage().unsafeGetStorageImpl();
    const c10::Storage* on_cpu = nullptr;
    for (const StoragePair& known : storages_) {
      if (known.original == storage) on_cpu = &known.on_cpu;
    }
    if (on_cpu == nullptr) {
      if (is_tiled(original)) {
        storages_.push_back({storage, untiled(original), original});
      } else {
        storages_.push_back({storage, alias_storage(original.storage(), shape_.writes), {}});
      }
      on_cpu = &storages_.back().on_cpu;
    }
    at::Tensor result = tensor_over(*on_cpu, original);
    aliases_.push_back({original, result, const_cast<void*>(on_cpu->data())});
    return result;
  }

  c10::List<at::Tensor> alias_all(const c10::List<at::Tensor>& tensors) {
    c10::List<at::Tensor> aliased;
    aliased.reserve(tensors.size());
    for (const at::Tensor& tensor : tensors) {
      aliased.push_back(is_on_device(tensor) ? alias(tensor) : tensor);
    }
    return aliased;
  }

  void alias_optionals(IValue& value) {
    c10::List<IValue> list = value.toList();
    bool has_tensor = false;
    for (const IValue& element : list) has_tensor = has_tensor || element.isTensor();
    if (!has_tensor) return;
    c10::List<std::optional<at::Tensor>> aliased;
    for (const IValue& element : list) {
      if (!element.isTensor()) {
        aliased.push_back(std::nullopt);
      } else {
        at::Tensor tensor = element.toTensor();
        aliased.push_back(is_on_device(tensor) ? alias(tensor) : tensor);
      }
    }
    value = aliased;
  }

  void replace_generator(IValue& value) {
    std::optional<at::Generator> given;
    if (value.isGenerator()) given = value.toGenerator();
    if (given.has_value() && given->device().is_cpu()) return;
    value = generator_for_call(given, *device_);
  }

  void put_tiles_back() {
    for (const StoragePair& known : storages_) {
      if (known.tiled.defined()) tile_back(known.tiled, known.on_cpu);
    }
  }

  // An out= tensor of the wrong size was resized by the kernel, on the CPU's side only.
  void follow_resizes() {
    for (const Alias& known : aliases_) {
      void* data = const_cast<void*>(known.on_cpu.storage().data());
      bool same_shape = known.on_cpu.sizes().equals(known.original.sizes());
      if (data == known.data && same_shape) continue;
      known.original.resize_(known.on_cpu.sizes());
      if (!known.on_cpu.strides().equals(known.original.strides())) {
        known.original.as_strided_(known.on_cpu.sizes(), known.on_cpu.strides());
      }
      copy_bytes(known.original, known.on_cpu);
    }
  }

  static void copy_bytes(const at::Tensor& to, const at::Tensor& from) {
    if (from.numel() == 0 || to.data_ptr() == from.data_ptr()) return;
    std::memcpy(to.data_ptr(), from.const_data_ptr(), from.numel() * from.element_size());
  }

  at::Tensor back(const at::Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (const Alias& known : aliases_) {
      if (known.on_cpu.is_same(result)) return known.original;
    }
    for (const StoragePair& known : storages_) {
      if (known.on_cpu.unsafeGetStorageImpl() != result.storage().unsafeGetStorageImpl()) continue;
      for (const Alias& alias : aliases_) {
        if (alias.original.storage().unsafeGetStorageImpl() != known.original) continue;
        return alias.original.as_strided(result.sizes(), result.strides(), result.storage_offset());
      }
    }
    if (stays_on_cpu_ || result.is_same(on_cpu_)) return result;
    return to_new_memory(result);
  }

  at::Tensor to_new_memory(const at::Tensor& result) {
    auto options = result.options().device(*device_).pinned_memory(false);
    bool dense = result.is_non_overlapping_and_dense();
    at::Tensor source = dense ? result : result.contiguous();
    at::Tensor moved = at::empty_strided(source.sizes(), source.strides(), options);
    copy_bytes(moved, source);
    if (result.unsafeGetTensorImpl()->is_wrapped_number()) {
      moved.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return moved;
  }

  const Shape& shape_;
  Stack& stack_;
  std::optional<c10::Device> device_;
  at::Tensor on_cpu_;
  bool stays_on_cpu_ = false;
  int64_t elements_ = 0;
  c10::SmallVector<Alias, 4> aliases_;
  c10::SmallVector<StoragePair, 4> storages_;
};

class CpuKernel final : public c10::OperatorKernel {
 public:
  explicit CpuKernel(const c10::OperatorHandle& op)
      : shape_(op.schema()), arguments_(op.schema().arguments().size()) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    size_t base = stack->size() - arguments_;
    // Results are told from what lies below them on the stack.
    Stack own(std::make_move_iterator(stack->begin() + base),
              std::make_move_iterator(stack->end()));
    stack->resize(base);
    Call call(shape_, own);
    call.to_cpu();
    if (call.is_large()) {
      AllCores cores;
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &own);
    } else {
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &own);
    }
    call.to_device();
    for (IValue& value : own) stack->push_back(std::move(value));
  }

 private:
  const Shape shape_;
  const size_t arguments_;
};

}  // namespace

AllCores::AllCores() : before_(omp_get_max_threads()) {
  static const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (before_ != all) omp_set_num_threads(all);
}

AllCores::~AllCores() { omp_set_num_threads(before_); }

void drain(c10::Device device) {
  aclrtStream stream = c10_npu::getCurrentNPUStream(device.index()).stream();
  TORCH_CHECK(npuSimDrain(stream) == 0, aclGetRecentErrMsg());
}

at::Tensor alias_on_cpu(const at::Tensor& tensor) {
  if (is_tiled(tensor)) return tensor_over(untiled(tensor), tensor);
  return tensor_over(alias_storage(tensor.storage(), false), tensor);
}

void install_cpu_kernel(const c10::OperatorHandle& op) {
  install(op, c10::DispatchKey::PrivateUse1,
          c10::KernelFunction::makeFromBoxedFunctor<CpuKernel>(std::make_unique<CpuKernel>(op)));
}

}  // namespace sim::operators
