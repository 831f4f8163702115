// SPDX-License-Identifier: Apache-2.0
//
// What the tests of backups on disk share: a folder for the files, allocations, and their sleep.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>
#include <system_error>
#include <vector>

#include "blocks.h"
#include "check.h"
#include "disk/backup.h"
#include "pool/pool.h"
#include "temporary_folder.h"

using camem::Action;
using camem::DiskBackup;
using camem::Place;
using camem::State;
using camem::Until;
using device::Faults;
using device::held;
using device::kMiB;

constexpr std::size_t kLarge = 20 * kMiB;  // pieces of 8, 8 and 4 MiB
constexpr std::size_t kSmall = 2 * kMiB;
constexpr std::size_t kBlocks = 32 * kMiB;  // two threads

// An empty folder, and the pool's backups in it.
class Disk {
 public:
  explicit Disk(bool keep_backup = true, Place place = Place::kDisk, std::size_t blocks = kBlocks) {
    camem::Settings settings = small_settings(kLarge);
    settings.keep_host_backup = keep_backup;
    settings.place = place;
    settings.backup_dir = folder_.path();
    settings.disk_blocks_bytes = blocks;
    pool().configure(settings);
  }
  ~Disk() { configure(); }

  const std::string& path() const { return folder_.path(); }
  bool has_names() const { return !std::filesystem::is_empty(path()); }

  // The open files in it: none has a name.
  std::vector<struct stat> files() const {
    std::vector<struct stat> files;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
      struct stat status{};
      if (target.rfind(path(), 0) == 0 && stat(entry.path().c_str(), &status) == 0) {
        CHECK(target.find("(deleted)") != std::string::npos);
        files.push_back(status);
      }
    }
    return files;
  }

 private:
  TemporaryFolder folder_;
};

struct World {
  explicit World(std::size_t large = kLarge) : weights("weights", large, 1) {}

  Block weights;
  Block small{"weights", kSmall, 2};
  Block runtime{"runtime", kSmall, 3};
  Block cache{"kv_cache", kSmall, 4};

  void check_intact() const { CHECK(weights.intact() && small.intact() && runtime.intact()); }
  bool all(State state) const {
    return weights.info().state == state && small.info().state == state &&
           runtime.info().state == state;
  }
};

constexpr std::size_t kAll = kLarge + 2 * kSmall;

inline camem::Plan level_1() {
  return plan({{"weights", Action::kOffload},
               {"runtime", Action::kOffload},
               {"kv_cache", Action::kDiscard}});
}

inline camem::Plan level_1_to(Place place) {
  camem::Plan plan = level_1();
  plan.place = place;
  return plan;
}

inline void sleep_all() { pool().sleep(level_1()); }
inline void wake_all() { wake({"weights", "runtime", "kv_cache"}); }

inline void sleep_to(Place place) { pool().sleep(level_1_to(place)); }

inline std::size_t sum_of(std::size_t camem::AllocationInfo::* figure) {
  std::size_t bytes = 0;
  for (const camem::AllocationInfo& info : pool().allocations()) bytes += info.*figure;
  return bytes;
}
inline std::size_t disk_bytes() { return sum_of(&camem::AllocationInfo::disk_bytes); }
inline std::size_t backup_host_bytes() { return sum_of(&camem::AllocationInfo::host_bytes); }

// Bytes that sleep, by where their backup lies.
inline std::size_t asleep(Place place) {
  return sum_of(place == Place::kDisk ? &camem::AllocationInfo::asleep_on_disk_bytes
                                      : &camem::AllocationInfo::asleep_in_host_bytes);
}

inline std::string failure_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const camem::TransactionError& error) {
    CHECK_THROWS(camem::DiskError, std::rethrow_exception(error.cause()));
    return error.what();
  }
  return "";
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != text.npos;
}
