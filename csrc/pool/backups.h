// SPDX-License-Identifier: Apache-2.0
//
// The host memory of the backups: where it comes from, and what is taken ahead of its use.
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

// Where host memory comes from, and what is held beside the backups, in bytes.
struct HostInfo {
  std::optional<HostChoice> choice;  // empty: nothing was needed yet
  std::optional<HostSpeeds> speeds;  // empty: not measured yet
  std::size_t prepared;              // page-locked, for backups to come
  std::size_t staging;               // page-locked, through which plain backups are copied
  std::uint64_t steps;               // of the model, for which what is prepared made room
};

// Protected by the pool's lock, but for what is said to be thread-safe.
class Backups {
 public:
  // `lock` is the pool's: what is locked in the background is put in place under it.
  Backups(std::mutex& lock, const Settings& settings, const Registry& registry, Transfer& transfer)
      : lock_(lock), settings_(settings), registry_(registry), transfer_(transfer) {}

  // Where page-locked memory comes from is found out anew.
  void forget_source() { choice_.reset(); }
  // To be asked for when the first memory is allocated: later on, memory and streams may be scarce.
  HostSource source(int device);

  // Throws OutOfHostMemory if the machine cannot give what a sleep of these has yet to take.
  void require_host_memory(const Tasks& offloads);
  // Bytes that a sleep of these has yet to take.
  std::size_t missing(Tasks::const_iterator first, Tasks::const_iterator last);
  // Whether backups of so many bytes, for which nothing is ready, are better copied into plain
  // memory.
  bool stages(int device, std::size_t bytes);
  // Threads that take host memory.
  unsigned threads() const;
  // A block that is ready, or none.
  std::optional<HostMemory> take(std::size_t bytes) { return reserve_.take(bytes); }
  // Takes back what a failed sleep took for a backup: it is kept if it was prepared. A sweep gives
  // back what this cannot.
  void take_back(const Allocation& allocation, Chunk& chunk) noexcept;

  // Takes page-locked memory for the backups of these tags in the background, and returns at once.
  // `slowly`: with one thread that rests half of the time.
  void prepare(const std::set<TagId>& tags, bool slowly);
  bool wait_prepared(double seconds) { return reserve_.wait(seconds); }  // thread-safe
  // Gives back what was prepared and not used.
  void release_prepared();
  // Nothing is allocated any more: all goes, but for what the backups hold.
  void clear() noexcept;
  void close() noexcept { reserve_.close(); }  // for good; thread-safe

  // An operation begins: nothing is put in place meanwhile.
  void pause() { reserve_.cancel(); }
  // A sleep is going to copy, and needs the driver for itself.
  void stop() { reserve_.stop(); }
  // An operation has ended, whatever its outcome. `to_host`: what a sleep copied, some of it into
  // memory that was prepared.
  void resume_background(const Tasks& to_host = {}) noexcept;

  // Thread-safe, and neither waits.
  void step_begins() noexcept { reserve_.step_begins(); }
  void step_ends() noexcept { reserve_.step_ends(); }

  HostInfo info();

 private:
  struct Prepared {
    std::set<TagId> tags;
    bool slowly;
  };

  void order_prepared();
  bool order_locking_of_plain_backups();
  bool put_in_place_of_plain(HostMemory& block);

  std::mutex& lock_;
  const Settings& settings_;
  const Registry& registry_;
  Transfer& transfer_;
  HostReserve reserve_;
  std::optional<Prepared> prepared_;  // what is to be ready in the reserve
  std::optional<HostChoice> choice_;
  std::optional<HostSpeeds> speeds_;
};

}  // namespace camem
