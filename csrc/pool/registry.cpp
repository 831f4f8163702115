// SPDX-License-Identifier: Apache-2.0
#include "pool/registry.h"

#include <algorithm>
#include <exception>
#include <optional>
#include <utility>

#include "ascendcl/contexts.h"
#include "ascendcl/optional.h"

namespace camem {
namespace {

// Whether a stream of the current context is idle; empty if it cannot be queried.
std::optional<bool> is_idle(aclrtStream stream) {
  aclrtStreamStatus status = ACL_STREAM_STATUS_NOT_READY;
  if (is_capturing(stream) || aclrtStreamQuery(stream, &status) != ACL_SUCCESS) return {};
  return status == ACL_STREAM_STATUS_COMPLETE;
}

}  // namespace

void Registry::add(std::unique_ptr<Allocation> allocation) {
  const auto address = reinterpret_cast<std::uintptr_t>(allocation->range.base());
  allocations_.emplace(address, std::move(allocation));
}

Allocation* Registry::find(std::uintptr_t address) const {
  const auto found = allocations_.find(address);
  return found == allocations_.end() ? nullptr : found->second.get();
}

void Registry::free_later(std::unique_ptr<Allocation> allocation, aclrtStream stream) {
  deferred_.push_back({std::move(allocation), stream});
}

void Registry::free_later(std::uintptr_t address, aclrtStream stream) {
  const auto found = allocations_.find(address);
  free_later(std::move(found->second), stream);
  allocations_.erase(found);
}

Tasks Registry::select(const std::function<bool(const Allocation&, const Chunk&)>& wanted) const {
  Tasks tasks;
  for (const auto& [address, allocation] : allocations_) {
    if (allocation->trimmed) continue;
    for (Chunk& chunk : allocation->chunks) {
      if (wanted(*allocation, chunk)) {
        tasks.push_back({allocation.get(), &chunk, chunk.content, bool(chunk.backup),
                         bool(chunk.disk), chunk.place, allocation->backup_sum,
                         allocation->backup_distrusted});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return a.allocation->device < b.allocation->device;
  });
  return tasks;
}

std::set<aclrtContext> Registry::contexts() const {
  std::set<aclrtContext> contexts;
  for (const auto& [address, allocation] : allocations_) {
    contexts.insert(default_context(allocation->device));
  }
  for (const Deferred& deferred : deferred_) {
    contexts.insert(default_context(deferred.allocation->device));
  }
  if (const aclrtContext own = current_context(); own != nullptr) contexts.insert(own);
  return contexts;
}

void Registry::sweep(Keep keep, bool synchronized) noexcept {
  bool again = unswept_ || !deferred_.empty();
  for (int attempt = 0; again && attempt < 2; ++attempt, again = unswept_) {
    unswept_ = false;
    for (auto& [allocation, stream] : deferred_) {
      try {
        const ContextGuard guard(default_context(allocation->device));
        if (!is_idle(stream).value_or(synchronized)) continue;
        allocation->release();
        allocation.reset();
      } catch (const std::exception&) {
        unswept_ = true;
      }
    }
    deferred_.erase(std::remove_if(deferred_.begin(), deferred_.end(),
                                   [](const Deferred& deferred) { return !deferred.allocation; }),
                    deferred_.end());
    for (auto& [address, allocation] : allocations_) {
      for (Chunk& chunk : allocation->chunks) {
        if (!chunk.settle(keep)) unswept_ = true;
      }
    }
  }
}

void Registry::unpark() noexcept {
  for (auto& [address, allocation] : allocations_) {
    for (Chunk& chunk : allocation->chunks) {
      if (chunk.content != Content::kParked) continue;
      try {
        DeviceGuard guard(allocation->device);
        chunk.remap(allocation->device);
      } catch (const std::exception&) {
        continue;
      }
    }
  }
}

}  // namespace camem
