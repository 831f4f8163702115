// SPDX-License-Identifier: Apache-2.0
//
// All allocations of this process, and those that torch has freed and AscendCL not yet.
#pragma once

#include <acl/acl.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "pool/allocation.h"

namespace camem {

// A chunk that an operation is about, and what it was before.
struct Task {
  Allocation* allocation;
  Chunk* chunk;
  Content before;
  bool had_backup;
};
using Tasks = std::vector<Task>;

// Not thread-safe: the pool's lock protects it.
class Registry {
 public:
  using Allocations = std::map<std::uintptr_t, std::unique_ptr<Allocation>>;

  void add(std::unique_ptr<Allocation> allocation);
  Allocation* find(std::uintptr_t address) const;  // that starts there, or null
  const Allocations& allocations() const { return allocations_; }
  bool is_empty() const { return allocations_.empty(); }

  // Torch has freed the allocation that starts there. A sweep gives it back.
  void doom(std::uintptr_t address, aclrtStream stream);
  bool has_doomed() const { return !doomed_.empty(); }

  // The chunks that are wanted, device by device. Nothing of what was trimmed.
  Tasks select(const std::function<bool(const Allocation&, const Chunk&)>& wanted) const;

  // Torch's contexts of the devices that hold memory, and this thread's, whatever it is: a user's
  // own work may be about that memory too.
  std::set<aclrtContext> contexts() const;

  // Gives back what no chunk needs any more, and what is freed: where `synchronized`, whatever the
  // stream says on which torch used it. A single failing call is made good at once; after more, the
  // next sweep tries again.
  void sweep(bool keep_backups, bool synchronized) noexcept;
  void needs_sweep() { unswept_ = true; }

  // Maps again what a failed operation had to leave unmapped, if that is possible by now.
  void unpark() noexcept;

 private:
  struct Doomed {
    std::unique_ptr<Allocation> allocation;
    aclrtStream stream;
  };

  Allocations allocations_;
  std::vector<Doomed> doomed_;
  bool unswept_ = false;
};

}  // namespace camem
