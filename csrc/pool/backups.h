// SPDX-License-Identifier: Apache-2.0
//
// Where backups go: to host memory, where that comes from and what is allocated in advance, or to a
// file.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <set>

#include "host/reserve.h"
#include "host/source.h"
#include "pool/registry.h"
#include "pool/settings.h"
#include "pool/transfer.h"

namespace camem {

// Where host memory comes from, and how many bytes are held besides the backups.
struct HostInfo {
  std::optional<HostChoice> choice;  // empty if not needed yet
  std::optional<HostSpeeds> speeds;  // empty if not measured yet
  std::size_t prepared;              // page-locked, for future backups
  std::size_t staging;               // page-locked, for copies of plain backups
  std::size_t disk_staging;          // page-locked, for copies of backups on disk
  std::uint64_t steps;               // steps of the model, during which preparation slows down
};

// The pool's lock protects it, except where a function is called thread-safe.
class Backups {
 public:
  // `lock` is the pool's: what is locked in the background is put in place under it.
  Backups(std::mutex& lock, const Settings& settings, Registry& registry, Transfer& transfer)
      : lock_(lock), settings_(settings), registry_(registry), transfer_(transfer) {}

  // The source of page-locked memory is determined again.
  void forget_source() { choice_.reset(); }
  // To be asked for when the first memory is allocated: later on, memory and streams may be scarce.
  // A sweep has to follow.
  HostSource source(int device);

  // Before a sleep of the first and a move of the second, neither of which is touched if it throws:
  // OutOfHostMemory if the machine lacks the memory that they still need, or DiskError if the disk
  // lacks the space, which is taken here.
  void take_place(Place place, const Tasks& offloads, const Tasks& moves);
  // Bytes of host memory that still have to be allocated for these.
  std::size_t missing(Tasks::const_iterator first, Tasks::const_iterator last);
  // Whether unprepared backups of this size are copied faster into plain memory.
  bool stages(int device, std::size_t bytes);
  // The number of threads that allocate host memory.
  unsigned threads() const;
  // The number of threads that write to or read from the disk, each with two blocks.
  unsigned disk_threads() const;
  // A prepared block, or none.
  std::optional<HostMemory> take(std::size_t bytes) { return reserve_.take(bytes); }
  // A backup in the other place counts again. Frees what a failed sleep or move has allocated
  // for a backup in this place, or keeps it if it was prepared before. A kept file stays, less what
  // was written to it. A sweep frees what could not be freed here.
  void roll_back(const Task& task, Place place) noexcept;

  // Page-locks memory for the backups of these tags in the background, and returns at once. With
  // `slowly`, one thread does it and pauses half of the time.
  void prepare(const std::set<TagId>& tags, bool slowly);
  bool wait_prepared(double seconds) { return reserve_.wait(seconds); }  // thread-safe
  // Frees what was prepared and not used.
  void release_prepared();
  // Frees everything but the backups. Nothing is allocated any more.
  void clear() noexcept;
  void close() noexcept { reserve_.close(); }  // final; thread-safe

  // An operation begins. Until it ends, the background puts no blocks in place.
  void pause() { reserve_.cancel(); }
  // A sleep is about to copy, and should not compete for the driver.
  void stop() { reserve_.stop(); }
  // An operation has ended or failed. `stored` is what a sleep copied or moved, possibly into
  // prepared memory.
  void resume_background(const Tasks& stored = {}) noexcept;

  // Thread-safe. Neither waits.
  void step_begins() noexcept { reserve_.step_begins(); }
  void step_ends() noexcept { reserve_.step_ends(); }

  HostInfo info();

 private:
  struct Prepared {
    std::set<TagId> tags;
    bool slowly;
  };

  void require_host_memory(const Tasks& tasks, bool moves = false);
  void take_space_on_disk(const Tasks& tasks);
  HostChoice try_registered_memory(int device);
  void order_prepared();
  bool order_locking_of_plain_backups();
  bool put_in_place_of_plain(HostMemory& block);
  const std::optional<HostChoice>& choice();  // as it is after what has failed since

  std::mutex& lock_;
  const Settings& settings_;
  Registry& registry_;
  Transfer& transfer_;
  HostReserve reserve_;
  std::optional<Prepared> prepared_;  // what the reserve should hold
  std::optional<HostChoice> choice_;
  std::optional<HostSpeeds> speeds_;
};

}  // namespace camem
