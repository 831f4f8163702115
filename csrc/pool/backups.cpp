// SPDX-License-Identifier: Apache-2.0
#include "pool/backups.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>

namespace camem {
namespace {

constexpr std::size_t kSample = std::size_t{4} << 20;  // that copies are tried on

// Locking fewer chunks than this takes less time than measuring which way is faster.
constexpr std::size_t kWorthMeasuring = 16;

// More requests in flight than any disk serves at once.
constexpr std::size_t kDiskThreads = 64;

// A pause before background work: a sleep and a wake may follow each other closely, and should not
// have to wait for the driver's locks.
constexpr std::chrono::seconds kQuiet{1};

}  // namespace

unsigned Backups::threads() const {
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  return std::max(settings_.copy_threads, std::min(settings_.host_threads, cores));
}

unsigned Backups::disk_threads() const {
  const std::size_t lanes = settings_.disk_blocks_bytes / (2 * DiskBackup::kPiece);
  return static_cast<unsigned>(std::clamp<std::size_t>(lanes, 1, kDiskThreads));
}

HostSource Backups::source(int device) {
  transfer_.open(device);
  if (!choice_) {
    choice_ = settings_.host_choice;
    if (choice_->source == HostSource::kRegistered) {
      choice_ = try_registered_memory(device);
    }
  }
  return choice()->source;
}

// What a failing call leaves of the sample, a sweep gives back, as it does with any memory.
HostChoice Backups::try_registered_memory(int device) {
  forget_registering_failure();
  std::unique_ptr<Allocation> sample;
  std::string why = "the device has no stream left to try copies on";
  try {
    transfer_.with_stream(device, [&](CopyStream* stream) {
      if (stream == nullptr) return;
      const std::size_t bytes = std::max(kSample, granularity(device));
      sample = std::make_unique<Allocation>(device, bytes, TagId{}, bytes);
      Chunk& chunk = sample->chunks.front();
      chunk.backup = HostMemory::page_locked(bytes, HostSource::kRegistered);
      chunk.copying = {stream};
      why = chunk.backup.is_registered() ? why_registered_copies_are_not_used(
                                               chunk.backup.data(), chunk.address, bytes, *stream)
                                         : last_locking_failure();
      sample->release();
    });
  } catch (const std::exception& error) {
    why = std::string("registered memory could not be tried: ") + error.what();
  }
  if (sample) registry_.free_later(std::move(sample), nullptr);
  if (!why.empty()) return {HostSource::kAcl, why};
  return {HostSource::kRegistered, "copies from and to it were tried: asynchronous and exact"};
}

const std::optional<HostChoice>& Backups::choice() {
  if (choice_ && choice_->source == HostSource::kRegistered) {
    if (const std::string failure = registering_failure(); !failure.empty()) {
      choice_ = {HostSource::kAcl, "a block could not be registered, and no other is: " + failure};
      speeds_.reset();
    }
  }
  return choice_;
}

bool Backups::stages(int device, std::size_t bytes) {
  if (bytes == 0 || settings_.unprepared == Unprepared::kLock) return false;
  if (settings_.unprepared == Unprepared::kStage) return true;
  if (!speeds_) {
    if (bytes < kWorthMeasuring * settings_.chunk_bytes) return false;
    speeds_ = transfer_.staging().open_and_measure(device, threads(), source(device));
    if (!speeds_) return false;  // each block tries page-locked memory first
  }
  return speeds_->copying > speeds_->locking;
}

std::size_t Backups::missing(Tasks::const_iterator first, Tasks::const_iterator last) {
  std::vector<std::size_t> sizes;
  std::for_each(first, last, [&](const Task& task) {
    if (!task.chunk->backup) sizes.push_back(task.chunk->bytes);
  });
  const std::vector<std::size_t> missing = reserve_.not_ready(sizes);
  return std::accumulate(missing.begin(), missing.end(), std::size_t{0});
}

void Backups::require_host_memory(const Tasks& tasks, bool moves) {
  const std::size_t needed = missing(tasks.begin(), tasks.end());
  if (needed <= available_host_bytes()) return;
  reserve_.wait_until_idle();
  const std::size_t available = available_host_bytes();
  if (needed > available) throw_backup_does_not_fit(needed, available, moves);
}

// A file elsewhere is one from before the settings changed.
void Backups::take_space_on_disk(const Tasks& tasks) {
  const auto has_file = [&](const Chunk& chunk) {
    return chunk.disk && chunk.disk.file()->directory() == settings_.backup_dir;
  };
  std::size_t bytes = 0;
  for (const Task& task : tasks) bytes += has_file(*task.chunk) ? 0 : task.chunk->bytes;
  if (bytes == 0) return;
  if (settings_.backup_dir.empty()) {
    throw std::logic_error("backups cannot go to disk: no directory is set (backup_dir)");
  }
  const auto file = std::make_shared<DiskFile>(settings_.backup_dir, bytes);
  std::size_t offset = 0;
  for (const Task& task : tasks) {
    Chunk& chunk = *task.chunk;
    if (has_file(chunk)) continue;
    chunk.disk.release();
    chunk.disk = DiskBackup(file, offset, chunk.bytes);
    if (chunk.on_disk()) task.allocation->backup_sum.reset();
    offset += chunk.bytes;
  }
}

// What a chunk has in the other place stays until the commit, because a rollback needs it.
void Backups::take_place(Place place, const Tasks& offloads, const Tasks& moves) {
  Tasks tasks = offloads;
  tasks.insert(tasks.end(), moves.begin(), moves.end());
  if (place == Place::kDisk) {
    take_space_on_disk(tasks);
  } else {
    require_host_memory(tasks, !moves.empty());
  }
  for (const Task& task : offloads) {
    Chunk& chunk = *task.chunk;
    if (place == Place::kHost && chunk.disk &&
        chunk.disk.file()->directory() != settings_.backup_dir) {
      chunk.disk.release();
    }
    if (chunk.place != place) task.allocation->backup_sum.reset();
    chunk.place = place;
  }
}

void Backups::roll_back(const Task& task, Place place) noexcept {
  Chunk& chunk = *task.chunk;
  if (chunk.place != task.place) {  // nothing was written to the backup that it had
    chunk.place = task.place;
    task.allocation->backup_sum = task.backup_sum;
    task.allocation->backup_distrusted = task.backup_distrusted;
  }
  if (place == Place::kDisk) chunk.disk.forget_written();
  if (chunk.is_stuck()) return;
  if (place == Place::kDisk) {
    if (!task.had_file) chunk.disk.release();
    return;
  }
  if (task.had_host_memory || !chunk.backup) return;
  if (prepared_ && prepared_->tags.count(task.allocation->tag) != 0 &&
      chunk.backup.is_page_locked()) {
    reserve_.keep(std::move(chunk.backup));
    return;
  }
  try {
    chunk.backup.release();
  } catch (const std::exception&) {
  }
}

void Backups::prepare(const std::set<TagId>& tags, bool slowly) {
  reserve_.clear();
  prepared_.reset();
  require_host_memory(registry_.select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content == Content::kDevice && tags.count(allocation.tag) != 0;
  }));
  prepared_ = Prepared{tags, slowly};
  order_prepared();
}

void Backups::release_prepared() {
  prepared_.reset();
  reserve_.give_back();
}

void Backups::clear() noexcept {
  prepared_.reset();
  reserve_.clear();
  transfer_.staging().close();
  transfer_.disk_staging().close();
}

void Backups::resume_background(const Tasks& stored) noexcept {
  try {
    const bool used = prepared_ && std::any_of(stored.begin(), stored.end(), [&](const Task& task) {
                        return !task.chunk->on_disk() && !task.had_host_memory &&
                               prepared_->tags.count(task.allocation->tag) != 0;
                      });
    if (used) release_prepared();
    const Tasks on_disk = registry_.select([](const Allocation&, const Chunk& chunk) {
      return chunk.content == Content::kBackup && chunk.on_disk();
    });
    if (on_disk.empty()) transfer_.disk_staging().close();
    if (!order_locking_of_plain_backups() && prepared_ && !reserve_.is_working()) order_prepared();
  } catch (const std::exception&) {
    // Nothing is prepared then, and the next sleep allocates what it needs.
  }
}

// Page-locks memory for everything that needs a backup and has none.
void Backups::order_prepared() {
  HostReserve::Order order;
  std::vector<std::size_t> sizes;
  const Tasks tasks = registry_.select([&](const Allocation& allocation, const Chunk& chunk) {
    return chunk.content == Content::kDevice && !chunk.backup &&
           prepared_->tags.count(allocation.tag) != 0;
  });
  if (tasks.empty()) return;
  for (const Task& task : tasks) sizes.push_back(task.chunk->bytes);
  order.device = tasks.front().allocation->device;
  order.sizes = reserve_.not_ready(sizes);
  order.source = source(order.device);
  order.threads = prepared_->slowly ? 1 : threads();
  order.slowly = prepared_->slowly;
  reserve_.prepare(std::move(order));
}

// Replaces plain backups by page-locked memory, so that the next copy runs at the speed of the
// link. Not for backups that the wake frees, because freeing page-locked memory takes longer. False
// if there is none to replace.
bool Backups::order_locking_of_plain_backups() {
  HostReserve::Order order;
  for (auto& [address, allocation] : registry_.allocations()) {
    for (const Chunk& chunk : allocation->chunks) {
      if (chunk.on_disk() || !chunk.backup || chunk.backup.is_page_locked()) continue;
      order.device = allocation->device;
      order.sizes.push_back(chunk.bytes);
    }
  }
  if (order.sizes.empty()) {
    transfer_.staging().close();
    return false;
  }
  if (!settings_.keep_host_backup) return true;
  order.source = source(order.device);
  order.slowly = true;
  order.delay = kQuiet;
  order.use = [this](HostMemory& block) { return put_in_place_of_plain(block); };
  reserve_.prepare(std::move(order));
  return true;
}

// False if the pool is busy.
bool Backups::put_in_place_of_plain(HostMemory& block) {
  std::unique_lock<std::mutex> lock(lock_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  for (auto& [address, allocation] : registry_.allocations()) {
    for (Chunk& chunk : allocation->chunks) {
      HostMemory& backup = chunk.backup;
      if (!backup || backup.is_page_locked() || backup.bytes() != block.bytes()) continue;
      std::memcpy(block.data(), backup.data(), block.bytes());
      std::swap(backup, block);
      return true;
    }
  }
  return true;
}

HostInfo Backups::info() {
  return {choice(),
          speeds_,
          reserve_.ready_bytes(),
          transfer_.staging().bytes(),
          transfer_.disk_staging().bytes(),
          reserve_.steps()};
}

}  // namespace camem
