// SPDX-License-Identifier: Apache-2.0
//
// Backups on disk: where they are, and what they hold of the host.
#include <algorithm>
#include <cerrno>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "disk/digest.h"
#include "disk_world.h"
#include "system_calls.h"

using system_calls::Counting;
using system_calls::Failing;
using system_calls::Fault;

namespace {

TEST(a_digest_differs_for_whatever_differs) {
  std::mt19937 random(1);
  std::vector<std::byte> data(4099);
  for (std::byte& each : data) each = static_cast<std::byte>(random());
  const camem::Digest before = camem::digest(data.data(), data.size());
  const std::vector<std::byte> copy = data;
  CHECK(camem::digest(copy.data(), copy.size()) == before);
  for (std::size_t bit = 0; bit < 8 * data.size(); bit += 7) {
    data[bit / 8] ^= std::byte{1} << (bit % 8);
    const camem::Digest after = camem::digest(data.data(), data.size());
    for (std::size_t half = 0; half < 2; ++half) {  // each of the two sums
      CHECK(after[2 * half] != before[2 * half] || after[2 * half + 1] != before[2 * half + 1]);
    }
    data[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  const auto word = data.begin() + 16;
  std::swap_ranges(word, word + 8, word + 8);  // of one pair, whose product knows no order
  CHECK(camem::digest(data.data(), data.size()) != before);
  std::swap_ranges(word, word + 8, word + 8);
  std::swap_ranges(word, word + 16, word + 16);  // two pairs
  CHECK(camem::digest(data.data(), data.size()) != before);
  std::swap_ranges(word, word + 16, word + 16);
  CHECK(camem::digest(data.data(), data.size()) == before);
  for (std::size_t start = 0; start < 3; ++start) {  // wherever it lies in memory
    std::vector<std::byte> moved(start);
    moved.insert(moved.end(), data.begin(), data.end());
    CHECK(camem::digest(moved.data() + start, data.size()) == before);
  }
  CHECK_THROWS(std::length_error, camem::digest(data.data(), camem::kMostDigested + 1));
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

std::size_t written(const camem::Report& report) {
  std::size_t bytes = 0;
  for (const auto& [tag, moved] : report.tags) bytes += moved.written;
  return bytes;
}

TEST(what_a_kept_file_has_is_not_written_again) {
  const Disk disk;
  World world;
  CHECK_EQ(written(pool().sleep(level_1())), kAll);
  wake_all();
  CHECK_EQ(disk_bytes(), kAll);
  for (const bool prepared : {false, true}) {
    const Counting calls;
    camem::Report report =
        pool().sleep(level_1(), {}, prepared ? Until::kPrepared : Until::kCommitted);
    if (prepared) report = pool().commit();
    CHECK_EQ(report.tags.at(pool().tag("weights")).offloaded, kLarge + kSmall);  // from the device
    CHECK_EQ(written(report), 0u);
    CHECK_EQ(calls.count("pwrite") + calls.count("open"), 0u);
    wake_all();
    world.check_intact();
  }
}

TEST(of_a_kept_file_the_pieces_that_changed_are_written) {
  const Disk disk;
  World world;
  sleep_all();
  wake_all();
  auto* address = static_cast<std::byte*>(world.weights.address()) + DiskBackup::kPiece + 5;
  std::byte before{}, changed{};
  CHECK_EQ(aclrtMemcpy(&before, 1, address, 1, ACL_MEMCPY_DEVICE_TO_HOST), 0);
  changed = before ^ std::byte{1};
  CHECK_EQ(aclrtMemcpy(address, 1, &changed, 1, ACL_MEMCPY_HOST_TO_DEVICE), 0);
  {
    const Counting calls;
    CHECK_EQ(written(pool().sleep(level_1())), DiskBackup::kPiece);
    CHECK_EQ(calls.count("pwrite"), 1u);
  }
  wake_all();
  std::byte after{};
  CHECK_EQ(aclrtMemcpy(&after, 1, address, 1, ACL_MEMCPY_DEVICE_TO_HOST), 0);
  CHECK(after == changed);
  CHECK_EQ(aclrtMemcpy(address, 1, &before, 1, ACL_MEMCPY_HOST_TO_DEVICE), 0);
  world.check_intact();
  world.weights.write(7);
  const Counting calls;
  CHECK_EQ(written(pool().sleep(level_1())), kLarge);
  CHECK_EQ(calls.count("open"), 0u);
  CHECK_EQ(calls.count("pwrite"), 3u);
  wake_all();
  world.check_intact();
}

// The disk may have lost what a failed sleep gave it, also where every write succeeded.
TEST(what_a_failed_sleep_has_written_is_written_again) {
  const Disk disk;
  World world;
  sleep_all();
  wake_all();
  for (const char* call : {"fdatasync", "pwrite"}) {
    world.weights.write(*call);
    {
      const Failing failing(call, 1, Fault::kError, EIO);
      CHECK(has(failure_of(sleep_all), "Input/output error"));
    }
    CHECK_EQ(disk_bytes(), kAll);  // the file stays
    const Counting calls;
    CHECK_EQ(written(pool().sleep(level_1())), kLarge);
    CHECK_EQ(calls.count("pwrite"), 3u);
    wake_all();
    world.check_intact();
  }
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
  world.small.write(5);
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
