// SPDX-License-Identifier: Apache-2.0
//
// What transactions do to chunks: copy to the host and back, map, unmap, forget.
#pragma once

#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>

#include "pool/backups.h"
#include "pool/registry.h"
#include "pool/settings.h"
#include "pool/transfer.h"

namespace camem {

// When a sleep gives device memory back.
enum class Release : std::uint8_t {
  kAsItComesFree,  // taking it back maps and copies again
  kAtCommit,       // taking it back needs neither memory nor copies
};

// The text of any exception that is one of the standard library's.
std::string message_of(std::exception_ptr error);

// A step failed at an allocation. `cause` is what it threw.
class StepFailure : public std::runtime_error {
 public:
  StepFailure(const Allocation& at, std::exception_ptr cause)
      : std::runtime_error(message_of(cause)), tag(at.tag), device(at.device), cause(cause) {}

  const TagId tag;
  const int device;
  const std::exception_ptr cause;
};

// Each step throws StepFailure at the first chunk that fails. Every chunk's `content` is true then,
// so that what was done can be taken back.
class Steps {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  Steps(const Settings& settings, Transfer& transfer, Backups& backups)
      : settings_(settings), transfer_(transfer), backups_(backups) {}

  // Copies the chunks to the host. Each, once its copy is verified, gives its device memory back,
  // or is parked until the commit.
  void offload(const Tasks& tasks, Release release);

  // Maps the chunks, waiting for device memory until the deadline, and copies back what the host
  // holds.
  void restore(Tasks tasks, Deadline deadline);

  void park(const Tasks& tasks);
  void discard(const Tasks& tasks);  // gives back memory whose content nobody needs

 private:
  class MapAhead;
  using Iterator = Tasks::const_iterator;

  void copy(Iterator first, Iterator last, Direction direction, bool takes_host_memory,
            const Transfer::Step& before, const Transfer::Step& after);

  const Settings& settings_;
  Transfer& transfer_;
  Backups& backups_;
};

}  // namespace camem
