// SPDX-License-Identifier: Apache-2.0
//
// Backups that move between host memory and disk while they sleep.
// Each system call of a move fails once in disk_faults_test.cpp.
#include <cerrno>
#include <string>

#include "disk_world.h"
#include "system_calls.h"

using camem::Report;
using system_calls::Counting;
using system_calls::Failing;
using system_calls::Fault;

namespace {

std::size_t moved(const Report& report, const std::string& tag) {
  const auto found = report.tags.find(pool().tag(tag));
  return found == report.tags.end() ? 0 : found->second.moved;
}

TEST(a_backup_that_moves_needs_no_device_and_leaves_no_host_memory) {
  const Disk disk(false, Place::kHost);
  World world;
  sleep_all();
  CHECK_EQ(asleep(Place::kHost), kAll);
  CHECK_EQ(held().host_bytes(), kAll);
  for (int time = 0; time < 2; ++time) {
    npuSimResetCounters();
    const Report there = pool().sleep(level_1_to(Place::kDisk));
    CHECK_EQ(moved(there, "weights"), kLarge + kSmall);
    CHECK_EQ(moved(there, "runtime"), kSmall);
    CHECK_EQ(asleep(Place::kDisk), kAll);
    CHECK_EQ(asleep(Place::kHost), 0u);
    CHECK_EQ(held().host_bytes(), 0u);
    CHECK_EQ(camem::page_locked_host_bytes() + camem::plain_host_bytes(), 0u);
    CHECK_EQ(disk.files().size(), 1u);
    CHECK_EQ(disk.files().front().st_mode & 0777u, 0600u);
    CHECK_EQ(static_cast<std::size_t>(disk.files().front().st_size), kAll);
    CHECK(!disk.has_names());
    const Report back = pool().sleep(level_1_to(Place::kHost));
    CHECK_EQ(moved(back, "weights"), kLarge + kSmall);
    CHECK_EQ(asleep(Place::kHost), kAll);
    CHECK_EQ(disk_bytes(), 0u);
    CHECK(disk.files().empty());
    CHECK_EQ(held().host_bytes(), kAll);
    for (const char* call : {"aclrtMemcpyAsync", "aclrtMemcpy", "aclrtMallocPhysical"}) {
      CHECK_EQ(npuSimCallCount(call), 0u);
    }
    CHECK(world.all(State::kOffloaded));
  }
  wake_all();
  world.check_intact();
}

TEST(a_moved_backup_wakes_from_where_it_lies) {
  const Disk disk(false, Place::kHost);
  World world;
  sleep_all();
  sleep_to(Place::kDisk);
  wake({"weights"});
  CHECK(world.weights.intact() && world.small.intact());
  CHECK_EQ(asleep(Place::kDisk), kSmall);
  sleep_all();  // to host memory, as the settings say; what sleeps on disk stays there
  CHECK_EQ(asleep(Place::kDisk), kSmall);
  CHECK_EQ(asleep(Place::kHost), kLarge + kSmall);
  sleep_to(Place::kHost);
  CHECK_EQ(asleep(Place::kHost), kAll);
  wake_all();
  world.check_intact();
}

TEST(what_is_awake_goes_to_the_place_that_a_sleep_names) {
  const Disk disk(true, Place::kHost);
  World world;
  for (const Place place : {Place::kDisk, Place::kHost, Place::kDisk}) {
    sleep_to(place);
    CHECK_EQ(asleep(place), kAll);
    CHECK(backup_host_bytes() == (place == Place::kHost ? kAll : 0u));
    wake_all();
    world.check_intact();
  }
  sleep_all();
  CHECK_EQ(asleep(Place::kHost), kAll);
  wake_all();
  world.check_intact();
}

TEST(only_tags_of_the_plan_move) {
  const Disk disk(false, Place::kHost);
  World world;
  sleep_all();
  camem::Plan plan = ::plan({{"runtime", Action::kOffload}});
  plan.place = Place::kDisk;
  CHECK_EQ(moved(pool().sleep(plan), "weights"), 0u);
  CHECK_EQ(asleep(Place::kDisk), kSmall);
  CHECK_EQ(asleep(Place::kHost), kLarge + kSmall);
  plan = ::plan({{"weights", Action::kDiscard}, {"runtime", Action::kDiscard}});
  plan.place = Place::kDisk;
  pool().sleep(plan);
  CHECK_EQ(asleep(Place::kDisk) + asleep(Place::kHost), 0u);
  CHECK_EQ(held().host_bytes(), 0u);
  CHECK(disk.files().empty());
  wake_all();
}

TEST(a_file_is_kept_while_its_chunks_sleep_in_host_memory) {
  const Disk disk(true, Place::kHost);
  World world;
  sleep_to(Place::kDisk);
  wake_all();
  sleep_all();
  CHECK_EQ(asleep(Place::kHost), kAll);
  CHECK_EQ(disk_bytes(), kAll);
  const Counting calls;
  const Report report = pool().sleep(level_1_to(Place::kDisk));
  CHECK_EQ(moved(report, "weights"), kLarge + kSmall);
  CHECK_EQ(report.tags.at(pool().tag("weights")).written, 0u);
  CHECK_EQ(calls.count("open") + calls.count("fallocate") + calls.count("pwrite"), 0u);
  CHECK_EQ(held().host_bytes(), 0u);
  wake_all();
  world.check_intact();
}

TEST(a_move_that_failed_writes_to_a_kept_file_again) {
  const Disk disk(true, Place::kHost);
  World world;
  sleep_to(Place::kDisk);
  wake_all();
  world.weights.write(6);
  sleep_all();
  {
    const Failing failing("fdatasync", 1, Fault::kError, EIO);
    CHECK(has(failure_of([] { sleep_to(Place::kDisk); }), "Input/output error"));
  }
  CHECK_EQ(asleep(Place::kHost), kAll);
  const Report report = pool().sleep(level_1_to(Place::kDisk));
  CHECK_EQ(report.tags.at(pool().tag("weights")).written, kLarge);
  wake_all();
  world.check_intact();
}

TEST(a_kept_backup_in_the_other_place_is_not_taken_for_this_one) {
  const Disk disk(true, Place::kHost);
  Block block("weights", kLarge);
  const camem::Sums sums{{reinterpret_cast<std::uintptr_t>(block.address()), 1}};
  const auto unchanged = [&](Place place) {
    const Report report = pool().sleep(level_1_to(place), sums);
    const std::size_t bytes = report.tags.at(pool().tag("weights")).unchanged;
    CHECK_EQ(asleep(place), kLarge);
    wake_all();
    CHECK(block.intact());
    return bytes;
  };
  CHECK_EQ(unchanged(Place::kHost), 0u);
  CHECK_EQ(unchanged(Place::kHost), kLarge);
  CHECK_EQ(unchanged(Place::kDisk), 0u);
  CHECK_EQ(unchanged(Place::kDisk), kLarge);
  CHECK_EQ(unchanged(Place::kHost), 0u);
}

TEST(a_sleep_that_failed_leaves_the_backup_in_the_other_place_and_its_checksum) {
  const Disk disk(true, Place::kHost);
  Block block("weights", kLarge);
  const camem::Sums sums{{reinterpret_cast<std::uintptr_t>(block.address()), 1}};
  const auto unchanged = [&](Place place) {
    const Report report = pool().sleep(level_1_to(place), sums);
    wake_all();
    CHECK(block.intact());
    return report.tags.at(pool().tag("weights")).unchanged;
  };
  CHECK_EQ(unchanged(Place::kHost), 0u);
  for (const char* call : {"pwrite", "fdatasync", "open"}) {
    {
      const Failing failing(call, 1, Fault::kError, EIO);
      CHECK(has(failure_of([&] { pool().sleep(level_1_to(Place::kDisk), sums); }), "as it was"));
    }
    CHECK_EQ(backup_host_bytes(), kLarge);
    CHECK_EQ(disk_bytes(), 0u);
    CHECK_EQ(unchanged(Place::kHost), kLarge);
  }
  pool().sleep(level_1_to(Place::kDisk), sums, Until::kPrepared);
  CHECK_EQ(pool().abort(), "");
  CHECK_EQ(unchanged(Place::kHost), kLarge);
  {  // memory that is no longer needed fails no sleep
    const Faults faults("aclrtFreeHost:1:507899:*,aclrtHostUnregister:1:507899:*");
    pool().sleep(level_1_to(Place::kDisk), sums);
    CHECK(faults.hits() > 0);
  }
  wake_all();
  CHECK(block.intact());
  {
    const Faults faults("aclrtMemcpyAsync:1:507899");
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1_to(Place::kHost), sums));
  }
  CHECK_EQ(unchanged(Place::kDisk), kLarge);
}

TEST(a_moved_backup_keeps_its_checksum) {
  const Disk disk(true, Place::kHost);
  Block block("weights", kLarge);
  const camem::Sums sums{{reinterpret_cast<std::uintptr_t>(block.address()), 1}};
  pool().sleep(level_1(), sums);
  sleep_to(Place::kDisk);
  wake_all();
  const Counting calls;
  const Report report = pool().sleep(level_1_to(Place::kDisk), sums);
  CHECK_EQ(report.tags.at(pool().tag("weights")).unchanged, kLarge);
  CHECK_EQ(calls.count("pwrite"), 0u);
  wake_all();
  CHECK(block.intact());
}

TEST(a_prepared_move_can_be_rolled_back) {
  const Disk disk(false, Place::kHost);
  World world;
  sleep_all();
  for (const Place place : {Place::kDisk, Place::kHost}) {
    const Place before = place == Place::kDisk ? Place::kHost : Place::kDisk;
    sleep_to(before);
    for (int time = 0; time < 2; ++time) {
      pool().sleep(level_1_to(place), {}, Until::kPrepared);
      CHECK_EQ(asleep(before), kAll);
      CHECK_EQ(backup_host_bytes(), kAll);
      CHECK_EQ(disk_bytes(), kAll);
      CHECK_EQ(pool().abort(), "");
      CHECK_EQ(asleep(before), kAll);
      CHECK_EQ(backup_host_bytes(), before == Place::kHost ? kAll : 0);
      CHECK_EQ(disk_bytes(), before == Place::kHost ? 0 : kAll);
    }
    pool().sleep(level_1_to(place), {}, Until::kPrepared);
    wake_all();  // which rolls it back first
    world.check_intact();
    sleep_to(before);
  }
  wake_all();
  world.check_intact();
}

TEST(prepared_memory_that_a_move_takes_is_not_prepared_again) {
  const Disk disk(false, Place::kHost);
  World world;
  pool().prepare({pool().tag("weights")}, false);
  CHECK(pool().wait_prepared(60));
  sleep_to(Place::kDisk);
  CHECK_EQ(pool().host_info().prepared, kLarge + kSmall);
  sleep_to(Place::kHost);
  CHECK_EQ(pool().host_info().prepared, 0u);
  sleep_to(Place::kDisk);
  wake_all();
  CHECK(pool().wait_prepared(60));
  CHECK_EQ(held().host_bytes(), 0u);
  world.check_intact();
}

TEST(what_torch_frees_during_a_prepared_move_is_forgotten) {
  const Disk disk(false, Place::kHost);
  World world;
  {
    Block block("weights", kLarge, 9);
    sleep_all();
    pool().sleep(level_1_to(Place::kDisk), {}, Until::kPrepared);
  }
  CHECK_EQ(moved(pool().commit(), "weights"), kLarge + kSmall);
  CHECK_EQ(asleep(Place::kDisk), kAll);
  CHECK_EQ(held().host_bytes(), 0u);
  wake_all();
  world.check_intact();
}

TEST(host_memory_that_cannot_be_freed_after_a_move_is_freed_later) {
  const Disk disk(true, Place::kHost);
  World world;
  sleep_all();
  {
    const Faults faults("aclrtFreeHost:1:507899:*,aclrtHostUnregister:1:507899:*");
    sleep_to(Place::kDisk);
    CHECK(faults.hits() > 0);
    CHECK_EQ(asleep(Place::kDisk), kAll);
    CHECK_EQ(held().host_bytes(), kAll);
  }
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(world.small.address());
  std::vector<std::byte> content(kSmall);
  CHECK(pool().read_backup(address, kSmall, content.data()));
  sleep_to(Place::kDisk);
  CHECK_EQ(held().host_bytes(), 0u);
  wake_all();
  world.check_intact();
}

TEST(plain_backups_move_too) {
  const Disk disk(false, Place::kHost);
  World world;
  const Faults faults("aclrtMallocHost:1:207001:*");
  sleep_all();
  CHECK_EQ(camem::plain_host_bytes(), kAll);
  sleep_to(Place::kDisk);
  CHECK_EQ(camem::plain_host_bytes(), 0u);
  sleep_to(Place::kHost);
  CHECK_EQ(camem::plain_host_bytes(), kAll);
  wake_all();
  world.check_intact();
}

TEST(a_move_without_space_or_without_a_directory_touches_nothing) {
  World world;
  {
    const Disk disk(false, Place::kHost);
    sleep_all();
    const Failing failing("statvfs", 1, Fault::kFull);
    const Counting calls;
    const std::string message = failure_of([] { sleep_to(Place::kDisk); });
    CHECK(has(message, std::to_string(kAll) + " bytes in " + disk.path()));
    CHECK_EQ(calls.count("open"), 0u);
    CHECK_EQ(asleep(Place::kHost), kAll);
  }
  CHECK_THROWS(camem::TransactionError, sleep_to(Place::kDisk));
  CHECK_EQ(asleep(Place::kHost), kAll);
  wake_all();
  world.check_intact();
}

TEST(content_that_changed_on_disk_does_not_move) {
  const Disk disk(false, Place::kHost);
  World world;
  sleep_to(Place::kDisk);
  {
    const Failing torn("pread", 3, Fault::kTorn);
    CHECK(has(failure_of([] { sleep_to(Place::kHost); }), "not what was written"));
  }
  CHECK_EQ(asleep(Place::kDisk), kAll);
  CHECK_EQ(backup_host_bytes(), 0u);
  CHECK_EQ(camem::page_locked_host_bytes() + camem::plain_host_bytes(),
           pool().host_info().disk_staging);
  wake_all();
  world.check_intact();
}

}  // namespace
