// SPDX-License-Identifier: Apache-2.0
//
// Counts every call of a simulated function and fails or delays the ones that a test names.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "error.h"

namespace sim::faults {

// What the rules say about one call.
struct Hit {
  int code = 0;  // to be returned, 0: none
  int delay_ms = 0;
  uint64_t rules = 0;  // that said so

  void wait() const;  // out the delay, or until there are other rules
};

// One exported function of the simulated libraries.
class Call {
 public:
  explicit Call(const char* name);
  // What the call must return at once, before it has any effect; 0 to go on. Waits out a delay.
  int enter();
  Hit hit();  // without waiting
  const std::string& name() const { return name_; }
  uint64_t count() const { return count_; }
  void reset_count() { count_ = 0; }

 private:
  std::string name_;
  bool supported_;  // by the chip
  std::atomic<uint64_t> count_{0};
};

// Of AscendCL by its name, of an operator like `aten::mm`. The form is `call:nth:code[:times]` or
// `call:nth:delay_ms=N[:times]`, comma separated. The nth call, counted from 1 and from now on, and
// the `times - 1` after it are hit; `*` is for ever. Replaces all earlier rules, and ends the
// delays of calls that are under way. False: not understood, nothing changed.
bool set(const char* rules);

uint64_t hits();  // calls that the rules have hit since they were set

uint64_t count(const char* name);
void reset_counts();

void keep_log(bool on);  // starts empty
std::string log();       // names of the calls since then, operators left out, one a line

void refuse_after_fork();  // from now on every call in this process is answered with an error

}  // namespace sim::faults

#define SIM_CALL()                               \
  static ::sim::faults::Call sim_call(__func__); \
  if (int sim_refused = sim_call.enter()) return sim_refused
