// SPDX-License-Identifier: Apache-2.0
//
// The allocations of this process, and the operations on them that torch's hooks and Python call.
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
  std::size_t host_bytes;                   // backup in host memory held now
  std::size_t page_locked_bytes;            // the page-locked part of that
  std::size_t disk_bytes;                   // backup on disk held now
  std::size_t asleep_in_host_bytes;         // what sleeps, and whose backup is in host memory
  std::size_t asleep_on_disk_bytes;         // or on disk
  std::optional<std::uint64_t> backup_sum;  // checksum of the backup, if one was given
};

// An operation failed because of `cause`; the message also says what was restored.
class TransactionError : public std::runtime_error {
 public:
  TransactionError(const std::string& message, std::exception_ptr cause, std::string tag,
                   int device)
      : std::runtime_error(message), cause_(cause), tag_(std::move(tag)), device_(device) {}

  std::exception_ptr cause() const { return cause_; }
  const std::string& tag() const { return tag_; }  // empty if no tag is concerned
  int device() const { return device_; }

 private:
  std::exception_ptr cause_;
  std::string tag_;
  int device_;
};

// How far an operation goes.
enum class Until : std::uint8_t {
  kPrepared,  // stops before the commit; the report is empty, and commit() or abort() follows
  kCommitted,
};

// Thread-safe. An operation holds the lock from start to end, so allocations on other threads wait.
// Nothing under the lock calls Python or torch.
class Pool {
 public:
  // Never destroyed: torch may free memory after static destructors have run.
  static Pool& instance();

  void configure(const Settings& settings);
  TagId tag(const std::string& name);
  std::string tag_name(TagId tag);
  std::vector<std::string> tag_names();

  // Sets the tag for allocations of the calling thread, and returns the previous one.
  TagId set_current_tag(TagId tag);

  // Returns at least `bytes` of device memory. Throws OutOfDeviceMemory or AclError.
  void* allocate(std::size_t bytes, int device);

  // Frees an allocation in any state: at once if `stream`, on which torch used it, is idle,
  // otherwise in a later operation. Never waits, because a stream may be capturing a graph, and
  // never throws; a later operation retries calls that fail.
  void free(void* address, aclrtStream stream) noexcept;

  // See Transaction::prepare_sleep() and prepare_wake(). A wake waits up to `timeout` for device
  // memory. Throw TransactionError; its message says what could not be restored.
  Report sleep(const Plan& plan, const Sums& sums = {}, Until until = Until::kCommitted);
  Report wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout,
              Until until = Until::kCommitted);

  // Commits what is prepared, or rolls it back and returns what failed, if anything. Any other
  // operation first rolls back what is prepared.
  Report commit();
  std::string abort();

  // Waits up to `device_timeout` for all work on the devices in use. Throws AclError.
  void wait_for_devices();

  // Frees the memory of segments that torch does not use, for good. Returns bytes.
  std::size_t trim(const std::set<std::uintptr_t>& addresses);

  // The next sleep copies these allocations again, even if their checksum is unchanged.
  void distrust_backups(const std::set<std::uintptr_t>& addresses);

  std::vector<AllocationInfo> allocations();

  // Copies [address, address + bytes) of a sleeping allocation from its backup to `target`. False
  // if no backup holds that memory. Throws DiskError.
  bool read_backup(std::uintptr_t address, std::size_t bytes, std::byte* target);

  // See Backups. wait_prepared() returns false on a timeout.
  void prepare(const std::set<TagId>& tags, bool slowly);
  bool wait_prepared(double seconds);
  void release_prepared();
  void step_begins() noexcept { backups_.step_begins(); }
  void step_ends() noexcept { backups_.step_ends(); }
  HostInfo host_info();

  // Bytes that the running operation has copied so far. Never waits.
  std::size_t copied_bytes() const { return transfer_.copied_bytes(); }

  // After this the hooks do nothing and everything else throws, because AscendCL may have shut
  // down. The same holds in a forked child.
  void abandon() noexcept;
  bool has_ended() const noexcept;  // abandon() was called in this process; a fork does not count

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
  RolledBack roll_back() noexcept;
  [[noreturn]] void fail(const char* operation, const std::string& outcome);

  std::mutex tags_mutex_;  // protects only the names, because their readers may hold the GIL
  std::vector<std::string> tag_names_;
  std::mutex mutex_;
  Settings settings_;
  std::map<int, std::size_t> granularity_;
  Registry registry_;
  Transfer transfer_;
  Backups backups_{mutex_, settings_, registry_, transfer_};
  Steps steps_{settings_, transfer_, backups_};
  std::optional<Prepared> prepared_;  // not committed yet
};

}  // namespace camem
