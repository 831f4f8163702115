// SPDX-License-Identifier: Apache-2.0
//
// Storages in FRACTAL_NZ. In the framework the format belongs to the storage, so every view has it.
// Operators see the elements in logical order.
#include <torch_npu/csrc/core/NPUStorageImpl.h>

#include <algorithm>
#include <cstring>
#include <typeinfo>

#include "operators/operators.h"

namespace sim::operators {
namespace {

constexpr int kAnyContent = 0xFF;  // a NaN in every float type

// Null for a storage that is not torch_npu's. torch_npu does not export the type, so its name is
// compared.
const torch_npu::NPUStorageDesc* description(const at::Tensor& tensor) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  if (std::strcmp(typeid(*storage).name(), "N9torch_npu14NPUStorageImplE") != 0) return nullptr;
  return &static_cast<torch_npu::NPUStorageImpl*>(storage)->npu_desc_;
}

std::optional<Tiling> tiling_of(const at::Tensor& tensor) {
  const torch_npu::NPUStorageDesc* storage = description(tensor);
  if (storage == nullptr || storage->npu_format_ != ACL_FORMAT_FRACTAL_NZ) return std::nullopt;
  TORCH_CHECK(tensor.dtype() == storage->data_type_, "a tensor of ", tensor.dtype(),
              " over a storage of ", storage->data_type_,
              " in FRACTAL_NZ has no elements in an order");
  auto tiling = Tiling::of(storage->base_sizes_, storage->storage_sizes_, tensor.itemsize());
  TORCH_CHECK(tiling.has_value() && tiling->tiled_bytes() <= tensor.storage().nbytes(),
              "the storage in FRACTAL_NZ does not have the sizes that it says");
  return tiling;
}

c10::Storage storage_at(void* address, size_t bytes, bool resizable) {
  c10::DataPtr data(address, c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                      resizable ? c10::GetAllocator(c10::kCPU) : nullptr, resizable);
}

}  // namespace

StorageOnCpu::StorageOnCpu(const at::Tensor& over, bool resizable)
    : address_(static_cast<char*>(const_cast<void*>(over.storage().data()))),
      tiling_(tiling_of(over)) {
  const size_t bytes = over.storage().nbytes();
  if (!tiling_.has_value()) {
    storage_ = storage_at(address_, bytes, resizable);
    return;
  }
  storage_ = c10::Storage(c10::Storage::use_byte_size_t(), std::max(tiling_->bytes(), bytes),
                          c10::GetAllocator(c10::kCPU), true);
}

void StorageOnCpu::read() const {
  if (!tiling_.has_value()) return;
  char* plain = static_cast<char*>(storage_.mutable_data());
  std::memset(plain, kAnyContent, storage_.nbytes());
  tiling_->untile(address_, plain);
}

void StorageOnCpu::write() const {
  if (tiling_.has_value()) tiling_->tile(static_cast<const char*>(storage_.data()), address_);
}

npuSimRange StorageOnCpu::range(const at::Tensor& over) const {
  if (tiling_.has_value()) return {address_, tiling_->tiled_bytes()};
  if (over.numel() == 0) return {nullptr, 0};
  size_t last = 0;
  for (int64_t i = 0; i < over.dim(); ++i) {
    last += static_cast<size_t>((over.size(i) - 1) * over.stride(i));
  }
  return {over.const_data_ptr(), (last + 1) * over.itemsize()};
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  c10::Storage shared = storage;
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(key), like.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return alias;
}

Operand::Operand(const at::Tensor& tensor)
    : storage_(tensor, false),
      on_cpu_(tensor_over(storage_.storage(), tensor, c10::DispatchKey::CPU)) {}

}  // namespace sim::operators
