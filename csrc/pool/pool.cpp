// SPDX-License-Identifier: Apache-2.0
#include "pool/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "ascendcl/contexts.h"

namespace camem {
namespace {

thread_local TagId t_current_tag = 0;
std::atomic<bool> g_abandoned{false};
std::atomic<bool> g_ended{false};

constexpr const char* kComesBack =
    "no weights are lost: what is not mapped comes back with wake_up, and the same call can be "
    "repeated";

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Throws if the allocator has been shut down.
void require_alive() {
  if (g_abandoned) {
    throw std::runtime_error(
        "the allocator is shut down in this process: it was forked from the one that uses the "
        "device, or its interpreter has ended; spawn processes that use a device");
  }
}

}  // namespace

Pool& Pool::instance() {
  static Pool* pool = new Pool();
  return *pool;
}

Pool::Pool() : tag_names_{"default"} {
  // A forked child has neither the device nor the threads of its parent.
  pthread_atfork(nullptr, nullptr, [] { g_abandoned = true; });
}

// Checks before locking, because in a forked child the lock may never be released, and afterwards,
// because the process may have ended meanwhile.
Pool::Lock Pool::lock() {
  require_alive();
  Lock lock(mutex_);
  require_alive();
  return lock;
}

void Pool::abandon() noexcept {
  g_ended = true;
  if (g_abandoned.exchange(true)) return;  // a forked child cannot join its parent's threads
  backups_.close();
  // Contexts must be destroyed before torch resets the device, unless an operation is running or a
  // copy has not completed.
  std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (lock.owns_lock() && !transfer_.is_stuck()) transfer_.close();
}

bool Pool::has_ended() const noexcept { return g_ended; }

void Pool::configure(const Settings& settings) {
  const Lock guard = lock();
  if (settings.host_choice != settings_.host_choice) backups_.forget_source();
  settings_ = settings;
  transfer_.set_patience(settings.device_timeout);
}

TagId Pool::tag(const std::string& name) {
  std::lock_guard<std::mutex> lock(tags_mutex_);
  const auto found = std::find(tag_names_.begin(), tag_names_.end(), name);
  if (found == tag_names_.end()) {
    tag_names_.push_back(name);
    return static_cast<TagId>(tag_names_.size() - 1);
  }
  return static_cast<TagId>(found - tag_names_.begin());
}

std::string Pool::tag_name(TagId tag) {
  std::lock_guard<std::mutex> lock(tags_mutex_);
  return tag_names_.at(tag);
}

std::vector<std::string> Pool::tag_names() {
  std::lock_guard<std::mutex> lock(tags_mutex_);
  return tag_names_;
}

TagId Pool::set_current_tag(TagId tag) { return std::exchange(t_current_tag, tag); }

void* Pool::allocate(std::size_t bytes, int device) {
  const Lock guard = lock();
  const DeviceGuard on_device(device);
  std::size_t& unit = granularity_[device];
  if (unit == 0) {
    unit = granularity(device);
    backups_.source(device);
  }
  sweep();
  const TagId tag = t_current_tag;
  std::size_t chunk_bytes = settings_.chunk_bytes;
  if (settings_.scratch_tags.count(tag) != 0) {
    chunk_bytes = std::max(chunk_bytes, settings_.scratch_chunk_bytes);
  }
  auto allocation = std::make_unique<Allocation>(
      device, round_up(std::max<std::size_t>(bytes, 1), unit), tag, round_up(chunk_bytes, unit));
  void* address = allocation->range.base();
  registry_.add(std::move(allocation));
  return address;
}

void Pool::free(void* address, aclrtStream stream) noexcept {
  if (g_abandoned) return;
  const Lock lock(mutex_);
  const auto start = reinterpret_cast<std::uintptr_t>(address);
  const Allocation* allocation = registry_.find(start);
  if (allocation == nullptr) return;
  if (prepared_) prepared_->transaction.forget(*allocation);
  registry_.free_later(start, stream);
  sweep();
  if (registry_.is_empty()) backups_.clear();
}

void Pool::sweep(bool synchronized) noexcept {
  const Keep keep = settings_.keep_host_backup ? Keep::kForNextSleep : Keep::kNothing;
  registry_.sweep(prepared_ ? Keep::kAll : keep, synchronized);
}

// A timed-out copy may still use memory that an operation would unmap or free.
void Pool::require_nothing_stuck() {
  if (!transfer_.is_stuck()) return;
  throw std::runtime_error(
      "a copy of an earlier operation has not ended yet; if it never does, end the process");
}

// Every transaction starts here. The caller has flushed the work that torch had queued.
void Pool::begin(const char* operation, bool waits) {
  backups_.pause();
  try {
    require_nothing_stuck();
    // Work may use memory that a rollback would unmap.
    if (waits || prepared_) wait_for(registry_.contexts(), settings_.device_timeout);
  } catch (...) {
    fail(operation, "nothing was touched, and the same call can be repeated");
  }
  try {
    const std::string trouble = roll_back().trouble;
    if (!trouble.empty()) throw std::runtime_error(trouble);
  } catch (...) {
    fail(operation, std::string("what had been prepared could not be rolled back; ") + kComesBack);
  }
  sweep(waits);
  transfer_.reset_copied_bytes();
}

template <class Prepare>
Report Pool::run(const char* operation, Time start, Until until, const Prepare& prepare) {
  prepared_.emplace(Prepared{{settings_, registry_, backups_, steps_}, start});
  try {
    prepare(prepared_->transaction);
  } catch (...) {
    const RolledBack result = roll_back();
    const char* scratch = result.lost_scratch ? " (KV cache and workspace without content)" : "";
    if (!result.trouble.empty()) {
      fail(operation, "the rollback failed too (" + result.trouble + "); " + kComesBack + scratch);
    }
    fail(operation,
         std::string("everything is as it was") + scratch + ", and the same call can be repeated");
  }
  return until == Until::kCommitted ? commit_prepared() : Report();
}

Report Pool::commit_prepared() {
  if (!prepared_) throw std::logic_error("nothing is prepared: there is nothing to commit");
  Prepared prepared = std::move(*prepared_);
  prepared_.reset();
  Report report = prepared.transaction.commit();
  sweep();
  backups_.resume_background(prepared.transaction.stored());
  report.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - prepared.start).count();
  return report;
}

RolledBack Pool::roll_back() noexcept {
  if (!prepared_) return {};
  const RolledBack result = prepared_->transaction.roll_back();
  prepared_.reset();
  return result;
}

Report Pool::sleep(const Plan& plan, const Sums& sums, Until until) {
  const Time start = std::chrono::steady_clock::now();
  const Lock guard = lock();
  begin("sleep", true);
  registry_.unpark();
  const auto release = until == Until::kCommitted ? Release::kAsItComesFree : Release::kAtCommit;
  return run("sleep", start, until,
             [&](Transaction& transaction) { transaction.prepare_sleep(plan, sums, release); });
}

Report Pool::wake(const std::set<TagId>& tags, std::chrono::duration<double> timeout, Until until) {
  const Time start = std::chrono::steady_clock::now();
  const Lock guard = lock();
  begin("wake", registry_.has_deferred());
  std::optional<Steps::Deadline> deadline;
  if (timeout.count() > 0) deadline = start + std::chrono::duration_cast<Time::duration>(timeout);
  return run("wake", start, until,
             [&](Transaction& transaction) { transaction.prepare_wake(tags, deadline); });
}

Report Pool::commit() {
  const Lock guard = lock();
  return commit_prepared();
}

std::string Pool::abort() {
  const Lock guard = lock();
  const std::string trouble = roll_back().trouble;
  backups_.resume_background();
  return trouble;
}

void Pool::wait_for_devices() {
  std::set<aclrtContext> contexts;
  std::chrono::milliseconds limit;
  {
    const Lock guard = lock();
    contexts = registry_.contexts();
    limit = settings_.device_timeout;
  }
  wait_for(contexts, limit);  // without the lock: torch may allocate and free meanwhile
}

// Called inside a catch block.
void Pool::fail(const char* operation, const std::string& outcome) {
  std::exception_ptr cause = std::current_exception();
  backups_.resume_background();
  std::string message = std::string(operation) + " failed";
  std::string tag;
  int device = -1;
  try {
    std::rethrow_exception(cause);
  } catch (const StepFailure& failure) {
    cause = failure.cause;
    tag = tag_name(failure.tag);
    device = failure.device;
    message += " at tag '" + tag + "' on device " + std::to_string(device);
  } catch (...) {
  }
  throw TransactionError(message + ": " + message_of(cause) + ". " + outcome + ".", cause, tag,
                         device);
}

std::size_t Pool::trim(const std::set<std::uintptr_t>& addresses) {
  const Lock guard = lock();
  require_nothing_stuck();
  wait_for(registry_.contexts(), settings_.device_timeout);
  std::size_t bytes = 0;
  for (const std::uintptr_t address : addresses) {
    Allocation* allocation = registry_.find(address);
    if (allocation == nullptr || allocation->trimmed) continue;
    if (prepared_) prepared_->transaction.forget(*allocation);
    allocation->trimmed = true;
    bytes += allocation->range.bytes();
    for (Chunk& chunk : allocation->chunks) chunk.content = Content::kNone;
  }
  registry_.needs_sweep();
  sweep(true);
  return bytes;
}

void Pool::distrust_backups(const std::set<std::uintptr_t>& addresses) {
  const Lock guard = lock();
  for (const std::uintptr_t address : addresses) {
    if (Allocation* allocation = registry_.find(address)) allocation->backup_distrusted = true;
  }
}

std::vector<AllocationInfo> Pool::allocations() {
  const Lock guard = lock();
  std::vector<AllocationInfo> infos;
  for (const auto& [address, allocation] : registry_.allocations()) {
    AllocationInfo info{address,
                        allocation->range.bytes(),
                        allocation->device,
                        allocation->tag,
                        allocation->state(),
                        0,
                        0,
                        0,
                        0,
                        0,
                        0,
                        allocation->backup_sum};
    for (const Chunk& chunk : allocation->chunks) {
      if (chunk.memory) info.device_bytes += chunk.bytes;
      if (chunk.backup) info.host_bytes += chunk.bytes;
      if (chunk.disk) info.disk_bytes += chunk.bytes;
      if (chunk.backup.is_page_locked()) info.page_locked_bytes += chunk.bytes;
      if (chunk.content == Content::kBackup) {
        (chunk.on_disk() ? info.asleep_on_disk_bytes : info.asleep_in_host_bytes) += chunk.bytes;
      }
    }
    infos.push_back(info);
  }
  return infos;
}

bool Pool::read_backup(std::uintptr_t address, std::size_t bytes, std::byte* target) {
  const Lock guard = lock();
  auto found = registry_.allocations().upper_bound(address);
  if (found == registry_.allocations().begin()) return false;
  for (const Chunk& chunk : (--found)->second->chunks) {
    const auto start = reinterpret_cast<std::uintptr_t>(chunk.address);
    const auto end = start + chunk.bytes;
    if (bytes == 0 || address >= end) continue;
    if (chunk.content != Content::kBackup) return false;
    const std::size_t count = std::min(bytes, end - address);
    if (chunk.on_disk()) {
      chunk.disk.read(address - start, count, target);
    } else {
      std::memcpy(target, chunk.backup.data() + (address - start), count);
    }
    address += count;
    target += count;
    bytes -= count;
  }
  return bytes == 0;
}

void Pool::prepare(const std::set<TagId>& tags, bool slowly) {
  const Lock guard = lock();
  backups_.prepare(tags, slowly);
}

bool Pool::wait_prepared(double seconds) {
  require_alive();
  return backups_.wait_prepared(seconds);
}

void Pool::release_prepared() {
  const Lock guard = lock();
  backups_.release_prepared();
}

HostInfo Pool::host_info() {
  const Lock guard = lock();
  return backups_.info();
}

}  // namespace camem
