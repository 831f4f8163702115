// SPDX-License-Identifier: Apache-2.0
//
// Allocations of the pool with known content.
#pragma once

#include <memory>
#include <string>

#include "device.h"
#include "pool/pool.h"

inline camem::Pool& pool() { return camem::Pool::instance(); }

inline camem::Settings small_settings(std::size_t chunk_bytes = 2 * device::kMiB,
                                      unsigned threads = 2) {
  camem::Settings settings;
  settings.chunk_bytes = chunk_bytes;
  settings.copy_threads = settings.host_threads = threads;
  return settings;
}

inline void configure(bool keep_host_backup = true, std::size_t chunk_bytes = 2 * device::kMiB,
                      unsigned threads = 2) {
  camem::Settings settings = small_settings(chunk_bytes, threads);
  settings.keep_host_backup = keep_host_backup;
  pool().configure(settings);
}

// Acts only on these tags; all others are kept.
inline camem::Plan plan(std::map<std::string, camem::Action> actions) {
  camem::Plan plan;
  plan.otherwise = camem::Action::kKeep;
  for (const auto& [name, action] : actions) plan.actions[pool().tag(name)] = action;
  return plan;
}

inline void wake(const std::set<std::string>& names) {
  std::set<camem::TagId> tags;
  for (const std::string& name : names) tags.insert(pool().tag(name));
  pool().wake(tags, {});
}

class Block {
 public:
  Block(const std::string& tag, std::size_t bytes, std::uint64_t seed = 1, int device = 0)
      : bytes_(bytes) {
    const camem::TagId before = pool().set_current_tag(pool().tag(tag));
    try {
      address_ = pool().allocate(bytes, device);
    } catch (...) {
      pool().set_current_tag(before);
      throw;
    }
    pool().set_current_tag(before);
    write(seed);
  }
  ~Block() { pool().free(address_, nullptr); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* address() const { return address_; }
  void write(std::uint64_t seed) {
    seed_ = seed;
    device::write(address_, bytes_, seed);
  }
  bool intact() const { return device::holds(address_, bytes_, seed_); }

  camem::AllocationInfo info() const {
    for (const camem::AllocationInfo& info : pool().allocations()) {
      if (info.address == reinterpret_cast<std::uintptr_t>(address_)) return info;
    }
    throw std::logic_error("the pool does not know this block");
  }

 private:
  std::size_t bytes_;
  std::uint64_t seed_ = 0;
  void* address_ = nullptr;
};
