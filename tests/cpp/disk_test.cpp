// SPDX-License-Identifier: Apache-2.0
//
// Backups on disk: where they are, and what they hold of the host.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "disk/crc32c.h"
#include "disk_world.h"
#include "system_calls.h"

using system_calls::Counting;
using system_calls::Failing;
using system_calls::Fault;

namespace {

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
    sleep_all();
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
  sleep_all();
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
  sleep_all();
  wake_all();
  CHECK_EQ(disk_bytes(), kAll);
  world.weights.write(7);
  const Counting calls;
  sleep_all();
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
  sleep_all();
  wake_all();
  CHECK_EQ(held().host_bytes(), kAll);
  {
    const Disk first;
    sleep_all();
    CHECK_EQ(disk_bytes(), kAll);
    CHECK(held().host_bytes() <= kBlocks);
    {
      const Disk second;
      wake_all();
      world.check_intact();
      sleep_all();
      CHECK(first.files().empty() && second.files().size() == 1);
    }
  }
  wake_all();
  world.check_intact();
  sleep_all();
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
    sleep_all();
    CHECK_EQ(held().host_bytes(), 0u);
    wake_all();
  }
  world.check_intact();
}

}  // namespace
