// SPDX-License-Identifier: Apache-2.0
//
// A sleep or a wake as a transaction: prepare does everything that can fail and can be rolled back,
// then commit cannot fail.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "pool/backups.h"
#include "pool/registry.h"
#include "pool/settings.h"
#include "pool/steps.h"

namespace camem {

enum class Action : std::uint8_t { kKeep, kOffload, kDiscard };

struct Plan {
  std::map<TagId, Action> actions;
  Action otherwise = Action::kOffload;  // for other tags, so that nothing unknown is lost
  std::optional<Place> place;  // of backups; those of offloaded tags that sleep already move there

  Action action(TagId tag) const {
    const auto found = actions.find(tag);
    return found == actions.end() ? otherwise : found->second;
  }
};

// Bytes that an operation moved for one tag.
struct Moved {
  std::size_t offloaded = 0;  // device to host
  std::size_t unchanged = 0;  // not copied: the backup holds it already
  std::size_t discarded = 0;  // freed without a copy
  std::size_t restored = 0;   // host to device
  std::size_t remapped = 0;   // mapped again without content
  std::size_t moved = 0;      // backups that slept in the other place
  std::size_t written = 0;    // to disk; less than what goes there if the file had it already
};

struct Report {
  std::map<TagId, Moved> tags;
  double seconds = 0;
};

// Checksums of the content of allocations, by address.
using Sums = std::map<std::uintptr_t, std::uint64_t>;

struct RolledBack {
  std::string trouble;        // what failed, or empty
  bool lost_scratch = false;  // scratch memory was freed, and is mapped again without content
};

// First one of the two prepares, which may throw; then commit() or roll_back(). The pool's lock
// must be held during each call, but not in between.
class Transaction {
 public:
  Transaction(const Settings& settings, Registry& registry, Backups& backups, Steps& steps)
      : settings_(settings), registry_(registry), backups_(backups), steps_(steps) {}

  // Applies the plan to everything that is mapped. Sleeping allocations are left unchanged, except
  // that Action::kDiscard drops their backup, and a place that the plan names is where the backups
  // of Action::kOffload move. An allocation whose checksum in `sums` equals that of
  // its backup is not copied. New backups keep their checksums.
  void prepare_sleep(const Plan& plan, const Sums& sums, Release release);

  // Restores every sleeping allocation of these tags, waiting for device memory until the deadline,
  // if there is one.
  void prepare_wake(const std::set<TagId>& tags, std::optional<Steps::Deadline> deadline);

  Report commit();  // tells what was done, and nothing of what torch has freed since prepare

  // Rolls back: every chunk is as before. A chunk that cannot be mapped keeps its content, and a
  // wake restores it.
  RolledBack roll_back() noexcept;

  // torch has freed this allocation meanwhile.
  void forget(const Allocation& allocation);

  // What is copied or moved to backups.
  Tasks stored() const;

 private:
  const Settings& settings_;
  Registry& registry_;
  Backups& backups_;
  Steps& steps_;
  Tasks to_backup_;
  Tasks to_none_;
  Tasks to_device_;
  Tasks to_place_;
  Place place_ = Place::kHost;
  Sums sums_;
};

}  // namespace camem
