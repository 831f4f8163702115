// SPDX-License-Identifier: Apache-2.0
//
// All allocations of this process, including those that torch has freed and AscendCL has not yet.
#pragma once

#include <acl/acl.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "pool/allocation.h"

namespace camem {

// A chunk of an operation, and what was true of it and of its allocation before.
struct Task {
  Allocation* allocation;
  Chunk* chunk;
  Content before;
  bool had_host_memory;
  bool had_file;
  Place place;
  std::optional<std::uint64_t> backup_sum;
  bool backup_distrusted;
};
using Tasks = std::vector<Task>;

// Not thread-safe: the pool's lock protects it.
class Registry {
 public:
  using Allocations = std::map<std::uintptr_t, std::unique_ptr<Allocation>>;

  void add(std::unique_ptr<Allocation> allocation);
  Allocation* find(std::uintptr_t address) const;  // the one that starts there, or null
  const Allocations& allocations() const { return allocations_; }
  bool is_empty() const { return allocations_.empty(); }

  // A sweep frees it once `stream` is idle.
  void free_later(std::unique_ptr<Allocation> allocation, aclrtStream stream);
  void free_later(std::uintptr_t address, aclrtStream stream);
  bool has_deferred() const { return !deferred_.empty(); }

  // The chunks for which `wanted` is true, sorted by device, without trimmed allocations.
  Tasks select(const std::function<bool(const Allocation&, const Chunk&)>& wanted) const;

  // torch's contexts on the devices with allocations, and this thread's context, because a user's
  // work in it may use that memory too.
  std::set<aclrtContext> contexts() const;

  // Frees what no chunk needs any more, and what torch has freed: if `synchronized`, without a look
  // at the stream on which torch used it. Retries a failing call once; then the next sweep retries.
  // After an operator failed, no wait for its context succeeds: what is freed then is kept until
  // the process ends.
  void sweep(Keep keep, bool synchronized) noexcept;
  void needs_sweep() { unswept_ = true; }

  // Tries to map what a failed operation had to leave unmapped.
  void unpark() noexcept;

 private:
  struct Deferred {
    std::unique_ptr<Allocation> allocation;
    aclrtStream stream;
  };

  Allocations allocations_;
  std::vector<Deferred> deferred_;
  bool unswept_ = false;
};

}  // namespace camem
