// SPDX-License-Identifier: Apache-2.0
//
// The allocations of this process, and the operations over them: what torch's hooks and Python
// call.
#pragma once

#include <chrono>
#include <cstddef>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool/backups.h"
#include "pool/registry.h"
#include "pool/settings.h"
#include "pool/steps.h"
#include "pool/transaction.h"
#include "pool/transfer.h"

namespace camem {

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

// An operation failed because of `cause`; the message also says what was restored.
class TransactionError : public std::runtime_error {
 public:
  TransactionError(const std::string& message, std::exception_ptr cause, std::string tag,
                   int device)
      : std::runtime_error(message), cause_(cause), tag_(std::move(tag)), device_(device) {}

  std::exception_ptr cause() const { return cause_; }
  const std::string& tag() const { return tag_; }  // empty: it is about none
  int device() const { return device_; }

 private:
  std::exception_ptr cause_;
  std::string tag_;
  int device_;
};

// How far an operation goes.
enum class Until : std::uint8_t {
  kPrepared,  // all that can fail is done; commit() or abort() follows, and the report is empty
  kCommitted,
};

// Thread-safe. An operation holds the lock from start to end, so an allocation on another thread
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

  // As Transaction::prepare_sleep() and prepare_wake() say; `timeout` is how long a wake waits for
  // device memory. Throw TransactionError, whose message says what is not as it was.
  Report sleep(const Plan& plan, const Sums& sums = {}, Until until = Until::kCommitted);
  Report wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout,
              Until until = Until::kCommitted);

  // Carries out what is prepared, or takes it back and returns what failed in that, empty: nothing.
  // Any other operation takes back what is prepared first.
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

  // See Backups. wait_prepared() is false: not in that time.
  void prepare(const std::set<TagId>& tags, bool slowly);
  bool wait_prepared(double seconds);
  void release_prepared();
  void step_begins() noexcept { backups_.step_begins(); }
  void step_ends() noexcept { backups_.step_ends(); }
  HostInfo host_info();

  // Bytes that the operation that runs has copied so far. Never waits for it.
  std::size_t copied_bytes() const { return transfer_.copied_bytes(); }

  // After this the hooks do nothing and everything else throws: the runtime below may be gone. The
  // same holds in a forked child.
  void abandon() noexcept;
  bool has_ended() const noexcept;  // by abandon() in this process, not by a fork

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Time = std::chrono::steady_clock::time_point;
  struct Prepared {
    Transaction transaction;
    Time start;
  };

  Pool();
  Lock lock();
  void sweep(bool synchronized = false) noexcept;
  void require_nothing_stuck();
  void begin(const char* operation, bool waits);
  template <class Prepare>
  Report run(const char* operation, Time start, Until until, const Prepare& prepare);
  Report commit_prepared();
  RolledBack take_back() noexcept;
  [[noreturn]] void fail(const char* operation, const std::string& outcome);

  std::mutex tags_mutex_;  // of the names alone: whoever asks for one may hold the GIL
  std::vector<std::string> tag_names_;
  std::mutex mutex_;
  Settings settings_;
  std::map<int, std::size_t> granularity_;
  Registry registry_;
  Transfer transfer_;
  Backups backups_{mutex_, settings_, registry_, transfer_};
  Steps steps_{settings_, transfer_, backups_};
  std::optional<Prepared> prepared_;  // and not yet committed
};

}  // namespace camem
