// SPDX-License-Identifier: Apache-2.0
//
// Storages in FRACTAL_NZ. The framework keeps the format with the storage, so that every view of it
// has it. Operators see the elements in their order.
#include <torch_npu/csrc/core/NPUStorageImpl.h>

#include <algorithm>
#include <cstring>
#include <typeinfo>

#include "operators.h"
#include "tiles.h"

namespace sim::operators {
namespace {

constexpr int kAnyContent = 0xFF;  // a NaN in every float type

// Nothing for a storage that only the CPU's side of torch knows. The library does not export the
// type, so its name has to tell.
const torch_npu::NPUStorageDesc* description(const at::Tensor& tensor) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  if (std::strcmp(typeid(*storage).name(), "N9torch_npu14NPUStorageImplE") != 0) return nullptr;
  return &static_cast<torch_npu::NPUStorageImpl*>(storage)->npu_desc_;
}

Tiling tiling_of(const at::Tensor& tensor) {
  const torch_npu::NPUStorageDesc& storage = *description(tensor);
  TORCH_CHECK(tensor.dtype() == storage.data_type_, "a tensor of ", tensor.dtype(),
              " over a storage of ", storage.data_type_,
              " in FRACTAL_NZ has no elements in an order");
  auto tiling = Tiling::of(storage.base_sizes_, storage.storage_sizes_, tensor.itemsize());
  TORCH_CHECK(tiling.has_value() && tiling->tiled_bytes() <= tensor.storage().nbytes(),
              "the storage in FRACTAL_NZ does not have the sizes that it says");
  return *tiling;
}

}  // namespace

bool is_tiled(const at::Tensor& tensor) {
  const torch_npu::NPUStorageDesc* storage = description(tensor);
  return storage != nullptr && storage->npu_format_ == ACL_FORMAT_FRACTAL_NZ;
}

c10::Storage untiled(const at::Tensor& tensor) {
  const Tiling tiling = tiling_of(tensor);
  const size_t bytes = std::max(tiling.bytes(), tensor.storage().nbytes());
  c10::Storage content(c10::Storage::use_byte_size_t(), bytes, c10::GetAllocator(c10::kCPU), true);
  char* plain = static_cast<char*>(content.mutable_data());
  std::memset(plain, kAnyContent, bytes);
  tiling.untile(static_cast<const char*>(tensor.storage().data()), plain);
  return content;
}

void tile_back(const at::Tensor& tensor, const c10::Storage& content) {
  tiling_of(tensor).tile(static_cast<const char*>(content.data()),
                         static_cast<char*>(tensor.storage().mutable_data()));
}

void put_back(const at::Tensor& tensor, const at::Tensor& alias) {
  if (is_tiled(tensor)) tile_back(tensor, alias.storage());
}

}  // namespace sim::operators
