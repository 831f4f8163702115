// SPDX-License-Identifier: Apache-2.0
//
// The arguments of one call of an operator as another backend's tensors, and the way back.
#pragma once

#include <ATen/core/ivalue.h>

#include <optional>
#include <vector>

#include "operators/operators.h"

namespace sim::operators {

// Tensors of the device as tensors of the CPU over the same memory, or of `meta`, which have none.
// Those that share a storage share one here.
class Aliases {
 public:
  Aliases(c10::DispatchKey key, bool resizable) : key_(key), resizable_(resizable) {}

  void replace(torch::jit::Stack& stack);  // tensors of the device, alone and in lists

  // The tensor of the device that a result stands for: an argument, or a view of one; undefined:
  // it is new.
  at::Tensor original_of(const at::Tensor& result) const;

  // Gives those whose alias an operator resized its sizes. Answers with the pairs.
  struct Alias {
    at::Tensor original;
    at::Tensor alias;
    const void* data;
  };
  std::vector<Alias> follow_resizes() const;

  void read() const;   // of those in tiles, before a kernel
  void write() const;  // back, behind a kernel that wrote
  std::vector<npuSimRange> ranges() const;

  // Of the CPU's side alone, for a kernel that runs when the originals may be gone.
  std::vector<StorageOnCpu> storages() const;

 private:
  struct Pair {
    c10::StorageImpl* original;
    std::optional<StorageOnCpu> on_cpu;
    c10::Storage storage;
  };

  at::Tensor of(const at::Tensor& original);
  const c10::Storage& storage_of(const at::Tensor& original);
  c10::List<at::Tensor> all(const c10::List<at::Tensor>& tensors);
  void replace_optionals(c10::IValue& value);

  const c10::DispatchKey key_;
  const bool resizable_;
  c10::SmallVector<Alias, 4> aliases_;
  c10::SmallVector<Pair, 4> pairs_;
};

}  // namespace sim::operators
