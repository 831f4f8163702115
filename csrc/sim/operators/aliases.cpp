// SPDX-License-Identifier: Apache-2.0
#include "operators/aliases.h"

namespace sim::operators {

using c10::IValue;

void Aliases::replace(torch::jit::Stack& stack) {
  for (IValue& value : stack) {
    if (value.isTensor()) {
      if (is_on_device(value.toTensor())) value = of(value.toTensor());
    } else if (value.isTensorList()) {
      value = all(value.toTensorList());
    } else if (value.isList()) {
      replace_optionals(value);
    }
  }
}

at::Tensor Aliases::of(const at::Tensor& original) {
  for (const Alias& known : aliases_) {
    if (known.original.is_same(original)) return known.alias;
  }
  const c10::Storage& storage = storage_of(original);
  at::Tensor alias = tensor_over(storage, original, key_);
  aliases_.push_back({original, alias, storage.data()});
  return alias;
}

const c10::Storage& Aliases::storage_of(const at::Tensor& original) {
  c10::StorageImpl* wanted = original.storage().unsafeGetStorageImpl();
  for (const Pair& known : pairs_) {
    if (known.original == wanted) return known.storage;
  }
  if (key_ == c10::DispatchKey::CPU) {
    StorageOnCpu on_cpu(original, resizable_);
    pairs_.push_back({wanted, on_cpu, on_cpu.storage()});
  } else {
    c10::Storage nothing(c10::Storage::use_byte_size_t(), original.storage().nbytes(),
                         c10::GetAllocator(c10::kMeta), true);
    pairs_.push_back({wanted, std::nullopt, nothing});
  }
  return pairs_.back().storage;
}

c10::List<at::Tensor> Aliases::all(const c10::List<at::Tensor>& tensors) {
  c10::List<at::Tensor> aliased;
  aliased.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    aliased.push_back(is_on_device(tensor) ? of(tensor) : tensor);
  }
  return aliased;
}

void Aliases::replace_optionals(IValue& value) {
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
      aliased.push_back(is_on_device(tensor) ? of(tensor) : tensor);
    }
  }
  value = aliased;
}

at::Tensor Aliases::original_of(const at::Tensor& result) const {
  for (const Alias& known : aliases_) {
    if (known.alias.is_same(result)) return known.original;
  }
  for (const Pair& known : pairs_) {
    if (known.storage.unsafeGetStorageImpl() != result.storage().unsafeGetStorageImpl()) continue;
    for (const Alias& alias : aliases_) {
      if (alias.original.storage().unsafeGetStorageImpl() != known.original) continue;
      return alias.original.as_strided(result.sizes(), result.strides(), result.storage_offset());
    }
  }
  return {};
}

std::vector<Aliases::Alias> Aliases::follow_resizes() const {
  std::vector<Alias> resized;
  for (const Alias& known : aliases_) {
    bool same_shape = known.alias.sizes().equals(known.original.sizes());
    if (known.alias.storage().data() == known.data && same_shape) continue;
    known.original.resize_(known.alias.sizes());
    if (!known.alias.strides().equals(known.original.strides())) {
      known.original.as_strided_(known.alias.sizes(), known.alias.strides());
    }
    resized.push_back(known);
  }
  return resized;
}

void Aliases::read() const {
  for (const Pair& known : pairs_) known.on_cpu->read();
}

void Aliases::write() const {
  for (const Pair& known : pairs_) known.on_cpu->write();
}

std::vector<npuSimRange> Aliases::ranges() const {
  std::vector<npuSimRange> ranges;
  for (const Alias& known : aliases_) {
    for (const Pair& pair : pairs_) {
      if (pair.original != known.original.storage().unsafeGetStorageImpl()) continue;
      ranges.push_back(pair.on_cpu->range(known.alias));
    }
  }
  return ranges;
}

std::vector<StorageOnCpu> Aliases::storages() const {
  std::vector<StorageOnCpu> storages;
  for (const Pair& known : pairs_) storages.push_back(*known.on_cpu);
  return storages;
}

}  // namespace sim::operators
