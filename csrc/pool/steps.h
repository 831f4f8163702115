// SPDX-License-Identifier: Apache-2.0
//
// What transactions do to chunks: copy to the host and back, move backups, map, unmap, discard.
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

// When a sleep frees device memory.
enum class Release : std::uint8_t {
  kAsItComesFree,  // a rollback allocates, maps and copies again
  kAtCommit,       // a rollback needs neither memory nor copies
};

// The text of an exception that is derived from std::exception.
std::string message_of(std::exception_ptr error);

// A step failed at an allocation. `cause` is the original exception.
class StepFailure : public std::runtime_error {
 public:
  StepFailure(const Allocation& at, std::exception_ptr cause)
      : std::runtime_error(message_of(cause)), tag(at.tag), device(at.device), cause(cause) {}

  const TagId tag;
  const int device;
  const std::exception_ptr cause;
};

// Each step throws StepFailure at the first chunk that fails. Every chunk's `content` is correct
// then, so that the work can be rolled back.
class Steps {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  Steps(const Settings& settings, Transfer& transfer, Backups& backups)
      : settings_(settings), transfer_(transfer), backups_(backups) {}

  // Copies the chunks to their backups. Once its copy is verified, a chunk's device memory is
  // freed, or parked until the commit: always parked if the backup is on disk, because a rollback
  // should not depend on reading it back.
  void offload(const Tasks& tasks, Release release);

  // Maps the chunks, waiting for device memory until the deadline, and copies the backups back.
  void restore(Tasks tasks, Deadline deadline);

  // Copies the backups of chunks that sleep to this place. They count where they were until the
  // commit.
  void move(const Tasks& tasks, Place place);
  void park(const Tasks& tasks);
  void discard(const Tasks& tasks);  // frees memory whose content is not needed

 private:
  class MapAhead;
  using Iterator = Tasks::const_iterator;

  Parallelism open_staging(Iterator first, Iterator last, bool takes_host_memory, bool stages);
  static void sync(const Tasks& tasks);
  void copy(Iterator first, Iterator last, Direction direction, Parallelism parallelism,
            const Transfer::Step& before, const Transfer::Step& after);

  const Settings& settings_;
  Transfer& transfer_;
  Backups& backups_;
};

}  // namespace camem
