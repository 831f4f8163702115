// SPDX-License-Identifier: Apache-2.0
//
// Backups on disk: where they are, what they hold of the host, and each system call failing once.
// The calls of AscendCL fail once in pool_faults_test.cpp.
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <string>

#include "blocks.h"
#include "check.h"
#include "disk/backup.h"
#include "disk/crc32c.h"
#include "pool/pool.h"
#include "system_calls.h"
#include "temporary_folder.h"

using camem::Action;
using camem::DiskBackup;
using camem::State;
using camem::Until;
using device::Faults;
using device::held;
using device::kMiB;
using system_calls::Counting;
using system_calls::Failing;
using system_calls::Fault;

namespace {

constexpr std::size_t kLarge = 20 * kMiB;  // pieces of 8, 8 and 4 MiB
constexpr std::size_t kSmall = 2 * kMiB;
constexpr std::size_t kBlocks = 32 * kMiB;  // two threads

// An empty folder, and the pool's backups in it.
class Disk {
 public:
  explicit Disk(bool keep_backup = true, std::size_t blocks = kBlocks) {
    camem::Settings settings = small_settings(kLarge);
    settings.keep_host_backup = keep_backup;
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

camem::Plan level_1() {
  return plan({{"weights", Action::kOffload},
               {"runtime", Action::kOffload},
               {"kv_cache", Action::kDiscard}});
}

void sleep() { pool().sleep(level_1()); }
void wake_all() { wake({"weights", "runtime", "kv_cache"}); }

std::size_t disk_bytes() {
  std::size_t bytes = 0;
  for (const camem::AllocationInfo& info : pool().allocations()) bytes += info.disk_bytes;
  return bytes;
}

std::string failure_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const camem::TransactionError& error) {
    CHECK_THROWS(camem::DiskError, std::rethrow_exception(error.cause()));
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

TEST(checksums_are_crc_32c) {
  const auto bytes = [](const char* text) { return reinterpret_cast<const std::byte*>(text); };
  for (const auto& sum : {camem::crc32c, camem::crc32c_portable}) {
    CHECK_EQ(sum(bytes("123456789"), 9), 0xe3069283u);  // the check value of CRC catalogues
    CHECK_EQ(sum(bytes(""), 0), 0u);
  }
  std::mt19937 random(1);
  std::vector<std::byte> data(4099);
  for (std::byte& each : data) each = static_cast<std::byte>(random());
  for (std::size_t length = 0; length < 70; ++length) {
    for (const std::size_t start : {0, 1, 3}) {
      CHECK_EQ(camem::crc32c(data.data() + start, length),
               camem::crc32c_portable(data.data() + start, length));
    }
  }
  const std::uint32_t before = camem::crc32c(data.data(), data.size());
  CHECK_EQ(before, camem::crc32c_portable(data.data(), data.size()));
  data[2000] ^= std::byte{1};
  CHECK(camem::crc32c(data.data(), data.size()) != before);
}

TEST(a_backup_on_disk_holds_no_more_of_the_host_than_its_blocks) {
  const Disk disk;
  World world;
  for (int cycle = 0; cycle < 2; ++cycle) {
    sleep();
    CHECK(world.all(State::kOffloaded));
    CHECK_EQ(held().device_bytes, 0u);
    CHECK_EQ(disk_bytes(), kAll);
    CHECK_EQ(world.weights.info().disk_bytes, kLarge);
    CHECK_EQ(world.weights.info().host_bytes, 0u);
    const std::size_t blocks = held().host_bytes();  // of the threads that came to copy
    CHECK(blocks >= 2 * DiskBackup::kPiece && blocks <= kBlocks);
    CHECK_EQ(camem::page_locked_host_bytes() + camem::plain_host_bytes(), blocks);
    CHECK_EQ(pool().host_info().disk_staging, blocks);
    wake_all();
    world.check_intact();
    CHECK_EQ(held().host_bytes(), 0u);
  }
}

TEST(the_file_has_no_name_and_only_its_user_may_open_it) {
  const Disk disk(false);
  World world;
  CHECK(disk.files().empty());
  pool().sleep(level_1(), {}, Until::kPrepared);
  for (const bool committed : {false, true}) {
    if (committed) pool().commit();
    CHECK(!disk.has_names());
    CHECK_EQ(disk.files().size(), 1u);
    const struct stat status = disk.files().front();
    CHECK_EQ(status.st_nlink, 0u);
    CHECK_EQ(status.st_mode & 0777u, 0600u);
    CHECK_EQ(static_cast<std::size_t>(status.st_size), kAll);
    CHECK(static_cast<std::size_t>(status.st_blocks) * 512 >= kAll);
  }
  wake_all();
  CHECK(disk.files().empty());
  world.check_intact();
}

TEST(what_wakes_gives_its_part_of_the_file_back) {
  const Disk disk(false);
  World world;
  sleep();
  const auto before = disk.files().front().st_blocks;
  wake({"weights"});
  CHECK(world.weights.intact() && world.small.intact());
  CHECK(world.runtime.info().state == State::kOffloaded);
  CHECK_EQ(disk_bytes(), kSmall);
  const auto given = static_cast<std::size_t>(before - disk.files().front().st_blocks) * 512;
  CHECK(given > kLarge + kSmall - kMiB && given < kLarge + kSmall + kMiB);  // and metadata
  pool().sleep(plan({{"runtime", Action::kDiscard}}));
  CHECK(disk.files().empty());
  CHECK_EQ(disk_bytes(), 0u);
}

TEST(a_kept_file_is_written_again_and_not_made_again) {
  const Disk disk;
  World world;
  sleep();
  wake_all();
  CHECK_EQ(disk_bytes(), kAll);
  world.weights.write(7);
  const Counting calls;
  sleep();
  CHECK_EQ(calls.count("open"), 0u);
  CHECK_EQ(calls.count("pwrite"), 5u);
  wake_all();
  world.check_intact();
}

TEST(unchanged_content_is_not_written) {
  const Disk disk;
  World world;
  camem::Sums sums;
  for (const Block* block : {&world.weights, &world.small, &world.runtime}) {
    sums[reinterpret_cast<std::uintptr_t>(block->address())] = 1;
  }
  pool().sleep(level_1(), sums);
  wake_all();
  sums[reinterpret_cast<std::uintptr_t>(world.small.address())] = 2;
  const Counting calls;
  const camem::Report report = pool().sleep(level_1(), sums);
  CHECK_EQ(calls.count("pwrite"), 1u);
  CHECK_EQ(report.tags.at(pool().tag("weights")).unchanged, kLarge);
  wake_all();
  world.check_intact();
}

TEST(the_place_of_backups_may_change_between_two_sleeps) {
  World world;
  configure();
  sleep();
  wake_all();
  CHECK_EQ(held().host_bytes(), kAll);
  {
    const Disk first;
    sleep();
    CHECK_EQ(disk_bytes(), kAll);
    CHECK(held().host_bytes() <= kBlocks);
    {
      const Disk second;
      wake_all();
      world.check_intact();
      sleep();
      CHECK(first.files().empty() && second.files().size() == 1);
    }
  }
  wake_all();
  world.check_intact();
  sleep();
  CHECK_EQ(disk_bytes(), 0u);
  CHECK_EQ(held().host_bytes(), kAll);
  wake_all();
  world.check_intact();
}

TEST(content_is_read_while_it_sleeps_on_disk) {
  const Disk disk;
  Block block("weights", kLarge, 5);
  std::vector<std::byte> awake(kLarge), asleep(kLarge);
  CHECK_EQ(aclrtMemcpy(awake.data(), kLarge, block.address(), kLarge, ACL_MEMCPY_DEVICE_TO_HOST),
           0);
  pool().sleep(level_1());
  const auto address = reinterpret_cast<std::uintptr_t>(block.address());
  CHECK(pool().read_backup(address, kLarge, asleep.data()));
  CHECK(asleep == awake);
  const std::size_t start = DiskBackup::kPiece - 3, count = DiskBackup::kPiece + 5;
  std::fill(asleep.begin(), asleep.end(), std::byte{});
  CHECK(pool().read_backup(address + start, count, asleep.data()));
  CHECK(std::equal(asleep.begin(), asleep.begin() + count, awake.begin() + start));
  {
    const Failing torn("pread", 1, Fault::kTorn);
    CHECK_THROWS(camem::DiskError, pool().read_backup(address, 1, asleep.data()));
  }
  wake_all();
  CHECK(block.intact());
}

TEST(without_page_locked_blocks_copies_are_synchronous) {
  const Disk disk;
  World world;
  {
    const Faults faults("aclrtMallocHost:1:207001:*");
    sleep();
    CHECK_EQ(held().host_bytes(), 0u);
    wake_all();
  }
  world.check_intact();
}

struct Operation {
  const char* name;
  std::function<void()> prepare;
  std::function<void()> run;
  State before;
};

const Operation kOperations[] = {
    {"sleep", [] {}, sleep, State::kMapped},
    {"sleep, prepared and committed", [] {},
     [] {
       pool().sleep(level_1(), {}, Until::kPrepared);
       pool().commit();
     },
     State::kMapped},
    {"wake", sleep, wake_all, State::kOffloaded},
    {"wake, prepared and committed", sleep,
     [] {
       pool().wake({pool().tag("weights"), pool().tag("runtime")}, {}, Until::kPrepared);
       pool().commit();
     },
     State::kOffloaded},
};

struct Kind {
  Fault fault;
  int error;
};

constexpr Kind kKinds[] = {{Fault::kError, EIO},    {Fault::kError, ENOSPC}, {Fault::kError, EINTR},
                           {Fault::kError, EINVAL}, {Fault::kShort, 0},      {Fault::kEmpty, 0},
                           {Fault::kTorn, 0}};

bool is_transfer(const std::string& call) { return call == "pread" || call == "pwrite"; }

// Interrupts, short transfers and refusals of O_DIRECT have another way; a torn write is found by
// the wake.
bool must_fail(const std::string& call, const Kind& kind) {
  if (call == "fcntl" || kind.error == EINTR || kind.fault == Fault::kShort) return false;
  if (is_transfer(call) && kind.error == EINVAL) return false;
  return !(call == "pwrite" && kind.fault == Fault::kTorn);
}

constexpr std::size_t kSwept = 10 * kMiB;  // pieces of 8 and 2 MiB

void survive(const Operation& operation, const std::string& call, std::size_t nth,
             const Kind& kind) {
  const device::Held before = held();
  {
    const Disk disk(false);
    World world(kSwept);
    operation.prepare();
    std::string message;
    {
      const Failing failing(call, nth, kind.fault, kind.error);
      message = failure_of(operation.run);
      CHECK_EQ(failing.hits(), 1u);
    }
    CHECK(!disk.has_names());
    CHECK_EQ(!message.empty(), must_fail(call, kind));
    if (!message.empty()) {
      CHECK(world.all(operation.before));
      CHECK(has(message, disk.path()) && has(message, "backup_dir"));
      CHECK(has(message, "the same call can be repeated"));
      if (operation.before == State::kMapped) {
        world.check_intact();
        CHECK_EQ(disk_bytes(), 0u);
        CHECK(disk.files().empty());
        CHECK_EQ(held().host_bytes(), 0u);
      } else {
        CHECK_EQ(disk_bytes(), kSwept + 2 * kSmall);
        CHECK_EQ(held().device_bytes, 0u);
      }
      operation.run();
    }
    if (call == "pwrite" && kind.fault == Fault::kTorn) {
      CHECK(has(failure_of(wake_all), "not what was written"));
      CHECK(world.all(State::kOffloaded));
      CHECK_EQ(held().device_bytes, 0u);
      pool().sleep(plan({{"weights", Action::kDiscard}, {"runtime", Action::kDiscard}}));
      wake_all();
    } else {
      wake_all();
      world.check_intact();
    }
  }
  CHECK_EQ(held(), before);
}

TEST(every_system_call_of_sleep_and_wake_may_fail_once) {
  std::size_t faults = 0;
  for (const Operation& operation : kOperations) {
    std::map<std::string, std::size_t> counts;
    {
      const Disk disk(false);
      World world(kSwept);
      operation.prepare();
      const Counting calls;
      operation.run();
      for (const std::string& name : calls.names()) counts[name] = calls.count(name);
      wake_all();
    }
    for (const auto& [call, count] : counts) {
      // To give back a part of a file is tried, and no more.
      if (call == "fallocate" && operation.before == State::kOffloaded) continue;
      for (std::size_t nth = 1; nth <= count; ++nth) {
        for (const Kind& kind : kKinds) {
          if (kind.fault != Fault::kError && !is_transfer(call)) continue;
          try {
            survive(operation, call, nth, kind);
            ++faults;
          } catch (const std::exception& error) {
            throw std::logic_error(std::string(operation.name) + ", " + call + " " +
                                   std::to_string(nth) + ", fault " +
                                   std::to_string(static_cast<int>(kind.fault)) + " " +
                                   std::strerror(kind.error) + ": " + error.what());
          }
        }
      }
    }
  }
  CHECK(faults >= 120);
}

TEST(too_little_space_is_found_before_anything_is_touched) {
  const Disk disk;
  World world;
  const Failing failing("statvfs", 1, Fault::kFull);
  const Counting calls;
  npuSimResetCounters();
  try {
    sleep();
    CHECK(false);
  } catch (const camem::TransactionError& error) {
    const std::string message = error.what();
    CHECK(has(message, std::to_string(kAll) + " bytes in " + disk.path()));
    CHECK(has(message, "free disk space, choose another backup_dir, or use level 2"));
    try {
      std::rethrow_exception(error.cause());
    } catch (const camem::DiskError& cause) {
      CHECK_EQ(cause.needed(), kAll);
      CHECK(cause.free() > 0 && cause.free() < kAll);
    }
  }
  CHECK_EQ(calls.count("open"), 0u);
  CHECK_EQ(npuSimCallCount("aclrtMemcpyAsync"), 0u);
  CHECK_EQ(npuSimCallCount("aclrtUnmapMem"), 0u);
  world.check_intact();
  CHECK(world.cache.intact());
}

TEST(a_disk_that_fails_for_good_keeps_everything_awake_or_asleep) {
  const Disk disk;
  World world;
  for (const char* call : {"pwrite", "fdatasync"}) {
    const Failing failing(call, 1, Fault::kError, EIO, true);
    for (int time = 0; time < 2; ++time) {
      const Counting calls;
      CHECK(has(failure_of(sleep), "Input/output error"));
      CHECK_EQ(calls.count("pread"), 0u);  // a rollback does not depend on the disk
      world.check_intact();
    }
  }
  sleep();
  {
    const Failing failing("pread", 2, Fault::kTorn, 0, true);
    for (int time = 0; time < 2; ++time) {
      const std::string message = failure_of(wake_all);
      CHECK(has(message, "not what was written") && has(message, "It is not used"));
      CHECK(world.all(State::kOffloaded));
    }
  }
  wake_all();
  world.check_intact();
}

// Whatever keeps the page cache in the path says so, and nothing of it stays in the cache.
TEST(where_o_direct_is_refused_the_page_cache_is_used_and_emptied) {
  struct Row {
    const char* call;
    int error;
    const char* why;
  };
  for (const Row& row : {Row{"fcntl", EINVAL, "refuses O_DIRECT"},
                         Row{"pwrite", EINVAL, "a request with O_DIRECT failed"},
                         Row{"pwrite", EFAULT, "a request with O_DIRECT failed"}}) {
    const Disk disk(false);
    World world;
    const Counting calls;
    {
      const Failing failing(row.call, 1, Fault::kError, row.error);
      sleep();
      CHECK_EQ(failing.hits(), 1u);
    }
    CHECK(has(camem::why_not_direct(), row.why));
    CHECK(calls.count("sync_file_range") > 0);
    {
      const Failing failing("sync_file_range", 1, Fault::kError, ENOSYS);
      wake_all();
    }
    world.check_intact();
  }
}

TEST(delayed_errors_of_the_page_cache_fail_the_sleep) {
  const Disk disk;
  World world;
  sleep();
  {
    const Failing failing("pread", 1, Fault::kError, EFAULT);  // from now on without O_DIRECT
    wake_all();
  }
  {
    const Failing failing("sync_file_range", 1, Fault::kError, ENOSPC);
    CHECK(has(failure_of(sleep), "No space left on device"));
  }
  world.check_intact();
  sleep();
  wake_all();
  world.check_intact();
}

TEST(a_file_system_without_nameless_files_or_preallocation_will_do) {
  {
    const Disk disk;
    World world;
    const Counting calls;
    {
      const Failing failing("open", 1, Fault::kError, EOPNOTSUPP);
      sleep();
    }
    CHECK_EQ(calls.count("unlink"), 1u);
    CHECK(!disk.has_names());
    CHECK_EQ(disk.files().size(), 1u);
    CHECK_EQ(disk.files().front().st_mode & 0777u, 0600u);
    wake_all();
    world.check_intact();
  }
  const Disk disk;
  World world;
  {
    const Failing failing("fallocate", 1, Fault::kError, EOPNOTSUPP);
    sleep();
  }
  wake_all();
  world.check_intact();
}

TEST(a_folder_that_is_gone_is_named) {
  camem::Settings settings = small_settings();
  settings.backup_dir = "/nowhere/at/all";
  pool().configure(settings);
  {
    Block block("weights", kSmall);
    CHECK(has(failure_of(sleep), "/nowhere/at/all (backup_dir)"));
    CHECK(block.intact());
  }
  configure();
}

}  // namespace
