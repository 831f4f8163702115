// SPDX-License-Identifier: Apache-2.0
//
// Backups on disk: each system call failing once, and disks that refuse, fail or lie.
// The calls of AscendCL fail once in pool_faults_test.cpp.
#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "disk_world.h"
#include "system_calls.h"

using system_calls::Counting;
using system_calls::Failing;
using system_calls::Fault;

namespace {

struct Operation {
  const char* name;
  std::function<void()> prepare;
  std::function<void()> run;
  State before;
  Place place = Place::kDisk;  // of what sleeps before
  bool keeps = false;          // host backups, from a sleep before
};

void sleep_to_disk() { sleep_to(Place::kDisk); }
void sleep_to_host() { sleep_to(Place::kHost); }

void prepare_and_commit(Place place) {
  pool().sleep(level_1_to(place), {}, Until::kPrepared);
  pool().commit();
}

void sleep_and_wake() {
  sleep_to_host();
  wake_all();
}

const Operation kOperations[] = {
    {"sleep", [] {}, sleep_all, State::kMapped},
    {"sleep, prepared and committed", [] {},
     [] {
       pool().sleep(level_1(), {}, Until::kPrepared);
       pool().commit();
     },
     State::kMapped},
    {"sleep after one in host memory", sleep_and_wake, sleep_to_disk, State::kMapped, Place::kHost,
     true},
    {"sleep after one in host memory, prepared and committed", sleep_and_wake,
     [] { prepare_and_commit(Place::kDisk); }, State::kMapped, Place::kHost, true},
    {"wake", sleep_all, wake_all, State::kOffloaded},
    {"wake, prepared and committed", sleep_all,
     [] {
       pool().wake({pool().tag("weights"), pool().tag("runtime")}, {}, Until::kPrepared);
       pool().commit();
     },
     State::kOffloaded},
    {"move to disk", sleep_to_host, sleep_to_disk, State::kOffloaded, Place::kHost},
    {"move to disk, prepared and committed", sleep_to_host,
     [] { prepare_and_commit(Place::kDisk); }, State::kOffloaded, Place::kHost},
    {"move to host", sleep_to_disk, sleep_to_host, State::kOffloaded},
    {"move to host, prepared and committed", sleep_to_disk,
     [] { prepare_and_commit(Place::kHost); }, State::kOffloaded},
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
    const Disk disk(operation.keeps);
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
        CHECK_EQ(backup_host_bytes(), operation.keeps ? kSwept + 2 * kSmall : 0);
        CHECK_EQ(held().host_bytes(), backup_host_bytes());
      } else {
        const bool on_disk = operation.place == Place::kDisk;
        CHECK_EQ(asleep(operation.place), kSwept + 2 * kSmall);
        CHECK_EQ(disk_bytes(), on_disk ? kSwept + 2 * kSmall : 0);
        CHECK_EQ(backup_host_bytes(), on_disk ? 0 : kSwept + 2 * kSmall);
        CHECK_EQ(disk.files().size(), on_disk ? 1u : 0u);
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

TEST(every_system_call_of_sleep_move_and_wake_may_fail_once) {
  std::size_t faults = 0;
  for (const Operation& operation : kOperations) {
    std::map<std::string, std::size_t> counts;
    {
      const Disk disk(operation.keeps);
      World world(kSwept);
      operation.prepare();
      const Counting calls;
      operation.run();
      for (const std::string& name : calls.names()) counts[name] = calls.count(name);
      wake_all();
    }
    for (const auto& [call, count] : counts) {
      // To give back a part of a file is tried, and no more.
      if (call == "fallocate" && operation.before == State::kOffloaded &&
          operation.place == Place::kDisk) {
        continue;
      }
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
  CHECK(faults >= 250);
}

TEST(too_little_space_is_found_before_anything_is_touched) {
  const Disk disk;
  World world;
  const Failing failing("statvfs", 1, Fault::kFull);
  const Counting calls;
  npuSimResetCounters();
  try {
    sleep_all();
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
      CHECK(has(failure_of(sleep_all), "Input/output error"));
      CHECK_EQ(calls.count("pread"), 0u);  // a rollback does not depend on the disk
      world.check_intact();
    }
  }
  sleep_all();
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
      sleep_all();
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
  sleep_all();
  {
    const Failing failing("pread", 1, Fault::kError, EFAULT);  // from now on without O_DIRECT
    wake_all();
  }
  world.weights.write(8);
  {
    const Failing failing("sync_file_range", 1, Fault::kError, ENOSPC);
    CHECK(has(failure_of(sleep_all), "No space left on device"));
  }
  world.check_intact();
  sleep_all();
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
      sleep_all();
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
    sleep_all();
  }
  wake_all();
  world.check_intact();
}

// The calls that only file systems without nameless files, preallocation or O_DIRECT need.
TEST(each_call_of_other_file_systems_may_fail_once) {
  struct Row {
    const char* missing;
    int error;
    const char* call;
  };
  for (const Row& row :
       {Row{"open", EOPNOTSUPP, "mkostemp"}, Row{"open", EOPNOTSUPP, "unlink"},
        Row{"fallocate", EOPNOTSUPP, "ftruncate"}, Row{"fcntl", EINVAL, "sync_file_range"}}) {
    for (const int error : {EIO, ENOSPC, EINTR}) {
      const Disk disk;
      World world(kSwept);
      const Failing missing(row.missing, 1, Fault::kError, row.error, true);
      std::string message;
      {
        const Failing failing(row.call, 1, Fault::kError, error);
        message = failure_of(sleep_all);
        CHECK_EQ(failing.hits(), 1u);
      }
      CHECK_EQ(message.empty(), error == EINTR || row.call == std::string("unlink"));
      CHECK(!disk.has_names());
      if (!message.empty()) {
        CHECK(has(message, disk.path()) && disk.files().empty());
        world.check_intact();
        sleep_all();
      }
      wake_all();
      world.check_intact();
    }
  }
}

TEST(a_folder_that_is_gone_is_named) {
  camem::Settings settings = small_settings();
  settings.place = Place::kDisk;
  settings.backup_dir = "/nowhere/at/all";
  pool().configure(settings);
  {
    Block block("weights", kSmall);
    CHECK(has(failure_of(sleep_all), "/nowhere/at/all (backup_dir)"));
    CHECK(block.intact());
  }
  configure();
}

}  // namespace
