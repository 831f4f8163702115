// SPDX-License-Identifier: Apache-2.0
//
// Faults of the system calls that backups on disk use. The tests' program defines these calls, so
// the core calls them instead of libc's, which they call in turn.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace system_calls {

enum class Fault {
  kError,  // returns -1 with the error
  kShort,  // transfers half
  kEmpty,  // transfers nothing
  kTorn,   // transfers all, with one byte changed
  kFull,   // finds a file system with one free block
};

struct Rule;

// While it lives, the n-th call of this name fails, or that and all later ones. Several may live.
class Failing {
 public:
  Failing(const std::string& call, std::size_t nth, Fault fault, int error = 0,
          bool lasting = false);
  ~Failing();
  Failing(const Failing&) = delete;
  Failing& operator=(const Failing&) = delete;

  std::size_t hits() const;

 private:
  const std::shared_ptr<Rule> rule_;
};

// While it lives, calls are counted. Begins anew with each one.
class Counting {
 public:
  Counting();
  std::size_t count(const std::string& call) const;
  std::vector<std::string> names() const;
};

}  // namespace system_calls
