// SPDX-License-Identifier: Apache-2.0
//
// A sleep or a wake, which happens as a whole or not at all: what can fail is done first and can be
// taken back, then it is committed, which cannot fail.
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
  Action otherwise = Action::kOffload;  // for tags that nobody named: never lose what is unknown

  Action action(TagId tag) const {
    const auto found = actions.find(tag);
    return found == actions.end() ? otherwise : found->second;
  }
};

// Bytes that one operation moved, of one tag.
struct Moved {
  std::size_t offloaded = 0;  // device to host
  std::size_t unchanged = 0;  // not copied: the backup holds it already
  std::size_t discarded = 0;  // content forgotten
  std::size_t restored = 0;   // host to device
  std::size_t remapped = 0;   // mapped again without content
};

struct Report {
  std::map<TagId, Moved> tags;
  double seconds = 0;
};

// Checksums of the content of allocations, by address.
using Sums = std::map<std::uintptr_t, std::uint64_t>;

struct RolledBack {
  std::string trouble;        // what failed in it, empty: nothing
  bool lost_scratch = false;  // scratch memory had been given back, and comes again empty
};

// One of the two prepares comes first and may throw; then commit() or take_back(). The pool's lock
// is held during each, and need not be in between.
class Transaction {
 public:
  Transaction(const Settings& settings, Registry& registry, Backups& backups, Steps& steps)
      : settings_(settings), registry_(registry), backups_(backups), steps_(steps) {}

  // Carries out the plan for everything that is mapped. Sleeping allocations stay as they are,
  // except that Action::kDiscard drops their host backup. What has a checksum in `sums` equal to
  // that of its backup is not copied; the sums are kept with the backups that are made.
  void prepare_sleep(const Plan& plan, const Sums& sums, Release release);

  // Brings back every sleeping allocation of these tags, waiting for device memory until the
  // deadline, if there is one.
  void prepare_wake(const std::set<TagId>& tags, std::optional<Steps::Deadline> deadline);

  Report commit();  // tells what was prepared, also of what torch has freed since

  // Makes every chunk what it was. What cannot be mapped again is kept with its content, and a wake
  // brings it back.
  RolledBack take_back() noexcept;

  // Torch has freed this allocation meanwhile.
  void forget(const Allocation& allocation);

  // What sleeps on the host once this is committed.
  const Tasks& to_host() const { return to_host_; }

 private:
  void add_to_report(const Tasks& tasks, std::size_t Moved::* kind);

  const Settings& settings_;
  Registry& registry_;
  Backups& backups_;
  Steps& steps_;
  Tasks to_host_;
  Tasks to_none_;
  Tasks to_device_;
  Sums sums_;
  Report report_;
};

}  // namespace camem
