// SPDX-License-Identifier: Apache-2.0
//
// The registry of all allocations of this process, and the transactions over them.
#pragma once

#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocation.h"
#include "contexts.h"
#include "host_reserve.h"
#include "host_source.h"
#include "transfer.h"

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

// What a sleep does for whose backup no page-locked memory is ready.
enum class Unprepared : std::uint8_t {
  kMeasured,  // what is faster on this host
  kLock,      // takes page-locked memory
  kStage,     // takes plain memory, and copies through page-locked blocks
};

struct Settings {
  std::size_t chunk_bytes = std::size_t{64} << 20;
  bool keep_host_backup = true;
  unsigned copy_threads = 3;   // threads that copy once the host memory is there
  unsigned host_threads = 16;  // threads that take host memory; at most one a core
  // What launched before may take to end, and a copy beyond what the slowest link needs for it.
  std::chrono::milliseconds device_timeout{60000};
  HostChoice host_choice{HostSource::kAcl, ""};  // registered memory is tried first
  Unprepared unprepared = Unprepared::kMeasured;
  // Tags whose content nobody needs once a sleep has begun. They take memory in larger chunks
  // (fewer calls), and a sleep gives it back at once: one that fails maps it again, empty.
  std::size_t scratch_chunk_bytes = std::size_t{1} << 30;
  std::set<TagId> scratch_tags;
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

struct AllocationInfo {
  std::uintptr_t address;
  std::size_t bytes;
  int device;
  TagId tag;
  State state;
  std::size_t device_bytes;                 // physical memory held now
  std::size_t host_bytes;                   // backup held now
  std::size_t page_locked_bytes;            // of it, page-locked
  std::optional<std::uint64_t> backup_sum;  // checksum of the backup, if one was given
};

// Where host memory comes from, and what is held beside the backups, in bytes.
struct HostInfo {
  std::optional<HostChoice> choice;  // empty: nothing was needed yet
  std::optional<HostSpeeds> speeds;  // empty: not measured yet
  std::size_t prepared;              // page-locked, for backups to come
  std::size_t staging;               // page-locked, through which plain backups are copied
  std::uint64_t steps;               // of the model, for which what is prepared made room
};

// Checksums of the content of allocations, by address.
using Sums = std::map<std::uintptr_t, std::uint64_t>;

// A transaction failed. `cause` is what failed first; the message also says what was restored.
class TransactionError : public std::runtime_error {
 public:
  TransactionError(const std::string& message, std::exception_ptr cause, std::string tag,
                   int device)
      : std::runtime_error(message), cause_(cause), tag_(std::move(tag)), device_(device) {}

  std::exception_ptr cause() const { return cause_; }
  const std::string& tag() const { return tag_; }
  int device() const { return device_; }

 private:
  std::exception_ptr cause_;
  std::string tag_;
  int device_;
};

// Thread-safe. A transaction holds the lock from start to end, so an allocation on another thread
// waits for it; nothing under the lock calls Python or torch.
class Pool {
 public:
  // Never destroyed: torch may free memory after static destructors have run.
  static Pool& instance();

  void configure(const Settings& settings);
  TagId tag(const std::string& name);
  std::string tag_name(TagId tag);
  std::vector<std::string> tag_names();

  // The tag that allocations of the calling thread get; returns the one before.
  TagId set_current_tag(TagId tag);

  // Device memory of at least `bytes`. Throws OutOfDeviceMemory or AclError.
  void* allocate(std::size_t bytes, int device);

  // Gives an allocation back in whatever state it is: at once where `stream`, on which torch used
  // it, is idle, else when a later operation finds that it is or has waited for the device. Never
  // waits, as a stream may be capturing a graph, and never throws; what a failing call leaves
  // behind is given back later as well.
  void free(void* address, aclrtStream stream) noexcept;

  // Carries out the plan for everything that is mapped. Sleeping allocations stay as they are,
  // except that Action::kDiscard drops their host backup. What has a checksum in `sums` equal to
  // that of its backup is not copied; the sums are kept with the backups that are made.
  Report sleep(const Plan& plan, const Sums& sums = {});

  // Brings back every sleeping allocation of these tags, waiting up to `timeout` for device memory.
  Report wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout);

  // The same in two steps: what can fail is done and held; then commit() carries it out, which
  // cannot fail, or abort() takes it back and returns what failed in that, empty: nothing. Any
  // other operation on the same memory takes back what is held first.
  void hold_sleep(const Plan& plan, const Sums& sums = {});
  void hold_wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout);
  Report commit();
  std::string abort();

  // Waits for all that was launched on the devices in use, no longer than for `device_timeout`.
  // Throws AclError.
  void wait_for_devices();

  // Gives back for good the memory of segments of which torch uses nothing. Returns bytes.
  std::size_t trim(const std::set<std::uintptr_t>& addresses);

  // The next sleep copies these allocations again, also where their checksum did not change.
  void distrust_backups(const std::set<std::uintptr_t>& addresses);

  std::vector<AllocationInfo> allocations();

  // Copies [address, address + bytes) of a sleeping allocation from its host backup to `target`.
  // False if that memory is not in a backup.
  bool read_backup(std::uintptr_t address, std::size_t bytes, std::byte* target);

  // Takes page-locked memory for the backups of these tags in the background, and returns at once.
  // `slowly`: with one thread that rests half of the time.
  void prepare(const std::set<TagId>& tags, bool slowly);
  // Waits until that is done; false: not in that time.
  bool wait_prepared(double seconds);
  // What is prepared makes room for the steps of the model. Neither waits.
  void step_begins() noexcept { reserve_.step_begins(); }
  void step_ends() noexcept { reserve_.step_ends(); }
  // Gives back what was prepared and not used.
  void release_prepared();

  HostInfo host_info();

  // Bytes that the transaction that runs has copied so far. Never waits for it.
  std::size_t copied_bytes() const { return transfer_.copied_bytes(); }

  // After this the hooks do nothing and everything else throws: the runtime below may be gone. The
  // same holds in a forked child.
  void abandon() noexcept;
  bool has_ended() const noexcept;  // by abandon() in this process, not by a fork

 private:
  struct Task {
    Allocation* allocation;
    Chunk* chunk;
    Content before;
    bool had_backup;
  };
  using Tasks = std::vector<Task>;
  using Deadline = std::chrono::steady_clock::time_point;
  class MapAhead;

  // What a step that waits for its commit has done.
  struct Held {
    Tasks to_host;
    Tasks to_none;
    Tasks woken;
    Sums sums;
    Report report;
    std::chrono::steady_clock::time_point start;
  };

  Pool();
  static void require_alive();
  void sweep(bool synchronized = false) noexcept;
  void require_nothing_stuck();
  void begin(const char* operation, bool waits);
  void return_backup(const Allocation& allocation, Chunk& chunk) noexcept;
  void unpark() noexcept;
  Tasks select(const std::function<bool(const Allocation&, const Chunk&)>& wanted);
  std::set<aclrtContext> contexts_in_use();
  void synchronize();
  std::size_t chunk_bytes(TagId tag) const;
  std::size_t missing_host_bytes(Tasks::const_iterator first, Tasks::const_iterator last);
  HostSource host_source(int device);
  bool stages(int device, std::size_t bytes);
  void preflight_host(const Tasks& offloads);
  void go_on_in_background(const Tasks& to_host = {}) noexcept;
  void order_prepared();
  bool order_locking_of_plain_backups();
  bool put_in_place_of_plain(HostMemory& block);
  void preflight_device(const Tasks& tasks);
  void offload(const Tasks& tasks, const Allocation** current, bool hold = false);
  void restore(Tasks tasks, Deadline deadline, const Allocation** current);
  void unmap(const Tasks& tasks, const Allocation** current);
  void forget(const Tasks& tasks, const Allocation** current);
  std::string undo_sleep(const Tasks& offloads, const Tasks& unchanged, const Tasks& discards,
                         const Tasks& scratch) noexcept;
  std::string undo_wake(const Tasks& tasks) noexcept;
  std::string take_back() noexcept;
  std::string outcome_of_taking_back() noexcept;
  void forget_held(const Allocation* allocation);
  [[noreturn]] void fail(const char* operation, const Allocation* at, const std::string& outcome);
  unsigned host_threads() const;
  Parallelism parallelism(bool takes_host_memory) const;

  std::mutex tags_mutex_;  // of the names alone: whoever asks for one may hold the GIL
  std::vector<std::string> tag_names_;
  std::mutex mutex_;
  Settings settings_;
  std::map<std::uintptr_t, std::unique_ptr<Allocation>> allocations_;
  // Freed by torch, not yet by AscendCL.
  struct Doomed {
    std::unique_ptr<Allocation> allocation;
    aclrtStream stream;  // on which torch used it
  };
  std::vector<Doomed> doomed_;
  bool unswept_ = false;
  std::optional<Held> held_;
  std::map<int, std::size_t> granularity_;
  Transfer transfer_;
  HostReserve reserve_;
  struct Prepared {
    std::set<TagId> tags;
    bool slowly;
  };
  std::optional<Prepared> prepared_;  // what is to be ready in the reserve
  std::optional<HostChoice> host_choice_;
  std::optional<HostSpeeds> host_speeds_;
};

}  // namespace camem
