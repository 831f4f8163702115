// SPDX-License-Identifier: Apache-2.0
//
// Counts every call of a simulated function, and fails or delays those that a test chooses.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "error.h"

namespace sim::faults {

// What the rules say about a call.
struct Hit {
  int code = 0;  // to return, or 0
  int delay_ms = 0;
  uint64_t rules = 0;  // the set of rules that it is from

  void wait() const;  // for the delay, or until there are new rules
};

// An exported function of the simulated libraries.
class Call {
 public:
  explicit Call(const char* name);
  // Waits for a delay. Returns the code that the call must return before it has any effect, or 0.
  int enter();
  Hit hit();  // does not wait
  const std::string& name() const { return name_; }
  uint64_t count() const { return count_; }
  void reset_count() { count_ = 0; }

 private:
  std::string name_;
  bool supported_;  // by the chip
  std::atomic<uint64_t> count_{0};
};

// Rules are comma separated, in the form `call:nth:code[:times]` or `call:nth:delay_ms=N[:times]`.
// A call is a function of AscendCL, or an operator such as `aten::mm`. A rule hits the nth call,
// counted from 1 and from now on, and the `times - 1` calls after it; `*` is for ever. Replaces all
// earlier rules, and ends current delays. Returns false, and changes nothing, if the rules are
// invalid.
bool set(const char* rules);

uint64_t hits();  // calls that the rules have hit since they were set

uint64_t count(const char* name);
void reset_counts();

void keep_log(bool on);  // starts empty
std::string log();       // names of the calls since then without operators, one per line

void refuse_after_fork();  // from now on every call in this process returns an error

}  // namespace sim::faults

#define SIM_CALL()                               \
  static ::sim::faults::Call sim_call(__func__); \
  if (int sim_refused = sim_call.enter()) return sim_refused
