// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace sim {

// Objects with opaque handles. A handle is never reused and belongs to one kind of object, so an
// old handle and a handle of another kind are both unknown.
template <typename T>
class Handles {
 public:
  explicit Handles(uint64_t kind) : kind_(kind) {}

  void* add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t handle = kind_ << 44 | next_++ << 4;
    objects_[handle] = std::move(object);
    return reinterpret_cast<void*>(handle);
  }

  std::shared_ptr<T> find(const void* handle) const {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = objects_.find(reinterpret_cast<uint64_t>(handle));
    return found == objects_.end() ? nullptr : found->second;
  }

  std::shared_ptr<T> remove(const void* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto node = objects_.extract(reinterpret_cast<uint64_t>(handle));
    return node.empty() ? nullptr : std::move(node.mapped());
  }

  std::vector<std::pair<void*, std::shared_ptr<T>>> all() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::pair<void*, std::shared_ptr<T>>> all;
    for (auto& [handle, object] : objects_) {
      all.emplace_back(reinterpret_cast<void*>(handle), object);
    }
    return all;
  }

  size_t size() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return objects_.size();
  }

 private:
  const uint64_t kind_;
  mutable std::mutex mutex_;
  uint64_t next_ = 1;
  std::map<uint64_t, std::shared_ptr<T>> objects_;
};

}  // namespace sim
