// SPDX-License-Identifier: Apache-2.0
//
// Converts the arguments of an operator's call to another backend's tensors, and the results back.
#pragma once

#include <ATen/core/ivalue.h>

#include <optional>
#include <vector>

#include "operators/operators.h"

namespace sim::operators {

// Device tensors as CPU tensors over the same memory, or as meta tensors, which have none. Tensors
// that share a storage also share one here.
class Aliases {
 public:
  Aliases(c10::DispatchKey key, bool resizable) : key_(key), resizable_(resizable) {}

  void replace(torch::jit::Stack& stack);  // device tensors, also in lists

  // The device tensor for a result: an argument or a view of one, or undefined if the result is
  // new.
  at::Tensor original_of(const at::Tensor& result) const;

  // Resizes device tensors whose alias an operator has resized. Returns the pairs.
  struct Alias {
    at::Tensor original;
    at::Tensor alias;
    const void* data;
  };
  std::vector<Alias> follow_resizes() const;

  void read() const;   // tensors in tiles, before a kernel
  void write() const;  // tensors in tiles, after a kernel has written
  std::vector<npuSimRange> ranges() const;

  // Only the CPU side, for a kernel that may run after the originals are gone.
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
