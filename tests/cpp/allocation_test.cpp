// SPDX-License-Identifier: Apache-2.0
//
// Chunks and allocations: their state follows from where the content is, and every operation can be
// retried after any of its calls has failed.
#include "pool/allocation.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "ascendcl/check.h"
#include "check.h"
#include "device.h"
#include "temporary_folder.h"

using camem::Allocation;
using camem::Content;
using camem::Keep;
using camem::Place;
using camem::State;
using device::Faults;
using device::held;
using device::kMiB;

namespace {

constexpr std::size_t kChunk = 2 * kMiB;
constexpr std::size_t kBytes = 3 * kChunk;

Allocation make(std::size_t bytes = kBytes) { return Allocation(0, bytes, 1, kChunk); }

std::vector<std::string> calls_of(const std::function<void()>& operation) {
  const device::CallLog log;
  operation();
  return log.calls();
}

TEST(an_allocation_maps_all_of_its_range_in_chunks) {
  Allocation allocation(0, 6 * kMiB, 3, 4 * kMiB);
  CHECK_EQ(allocation.chunks.size(), 2u);
  CHECK_EQ(allocation.chunks[0].bytes, 4 * kMiB);
  CHECK_EQ(allocation.chunks[1].bytes, 2 * kMiB);
  CHECK_EQ(allocation.chunks[1].address, allocation.range.base() + 4 * kMiB);
  CHECK_EQ(allocation.tag, 3);
  CHECK_EQ(held().device_bytes, 6 * kMiB);
  CHECK_EQ(held().mappings, 2u);
  CHECK_EQ(held().reservations, 1u);
  device::write(allocation.range.base(), 6 * kMiB, 7);
  CHECK(device::holds(allocation.range.base(), 6 * kMiB, 7));
}

TEST(an_allocation_moves_with_all_that_it_holds) {
  Allocation first = make();
  device::write(first.range.base(), kBytes, 2);
  Allocation second = std::move(first);
  CHECK(first.chunks.empty());
  CHECK_EQ(held().device_bytes, kBytes);
  CHECK(device::holds(second.range.base(), kBytes, 2));
}

TEST(a_constructor_that_fails_anywhere_leaves_nothing) {
  const device::Held before = held();
  std::optional<Allocation> sample;
  const auto calls = calls_of([&] { sample.emplace(make()); });
  sample.reset();
  CHECK_EQ(calls.size(), 7u);  // reserve, then allocate and map each of the three chunks
  for (const std::string& rule : device::single_faults(calls, device::kDriverError)) {
    const Faults faults(rule);
    CHECK_THROWS(camem::AclError, make());
    CHECK_EQ(held(), before);
  }
}

TEST(attach_goes_on_where_a_failed_one_stopped) {
  Allocation allocation = make();
  camem::Chunk& chunk = allocation.chunks[1];
  chunk.content = Content::kNone;
  CHECK(chunk.settle(Keep::kForNextSleep));
  CHECK_EQ(held().device_bytes, kBytes - kChunk);
  const auto calls = calls_of([&] {
    const Faults faults("aclrtMapMem:1:507899");
    CHECK_THROWS(camem::AclError, chunk.attach(0));
    CHECK(chunk.memory && !chunk.memory.mapped());
    chunk.attach(0);
  });
  CHECK_EQ(std::count(calls.begin(), calls.end(), "aclrtMallocPhysical"), 1);
  CHECK_EQ(held().device_bytes, kBytes);
  CHECK_EQ(held().mappings, 3u);
}

TEST(detach_leaves_to_settle_what_it_could_not_give_back) {
  Allocation allocation = make();
  camem::Chunk& chunk = allocation.chunks[0];
  {
    const Faults faults("aclrtUnmapMem:1:507899,aclrtFreePhysical:1:507899:2");
    CHECK_THROWS(camem::AclError, chunk.detach());
    CHECK(chunk.memory.mapped());
    chunk.detach();
    CHECK(chunk.memory && !chunk.memory.mapped());
    chunk.content = Content::kNone;
    CHECK(!chunk.settle(Keep::kForNextSleep));
    CHECK(chunk.settle(Keep::kForNextSleep));
  }
  CHECK(!chunk.memory);
  CHECK_EQ(held().device_bytes, kBytes - kChunk);
}

TEST(settle_keeps_what_the_content_needs) {
  struct Row {
    Content content;
    Place place;
    Keep keep;
    bool has_device, has_host_memory, has_file;
  };
  constexpr Content D = Content::kDevice, B = Content::kBackup, N = Content::kNone;
  constexpr Place kHost = Place::kHost, kDisk = Place::kDisk;
  constexpr Keep kNothing = Keep::kNothing, kNext = Keep::kForNextSleep, kAll = Keep::kAll;
  const TemporaryFolder folder;
  for (const Row& row : {
           Row{D, kHost, kNothing, true, false, false},
           Row{D, kHost, kNext, true, true, true},
           Row{D, kHost, kAll, true, true, true},
           Row{D, kDisk, kNothing, true, false, false},
           Row{D, kDisk, kNext, true, false, true},
           Row{D, kDisk, kAll, true, true, true},
           Row{B, kHost, kNothing, false, true, false},
           Row{B, kHost, kNext, false, true, true},
           Row{B, kHost, kAll, false, true, true},
           Row{B, kDisk, kNothing, false, false, true},
           Row{B, kDisk, kNext, false, false, true},
           Row{B, kDisk, kAll, false, true, true},
           Row{N, kHost, kNothing, false, false, false},
           Row{N, kDisk, kAll, false, false, false},
       }) {
    Allocation allocation = make(kChunk);
    camem::Chunk& chunk = allocation.chunks[0];
    chunk.backup = camem::HostMemory::page_locked(kChunk, camem::HostSource::kAcl);
    const auto file = std::make_shared<camem::DiskFile>(folder.path(), kChunk);
    chunk.disk = camem::DiskBackup(file, 0, kChunk);
    chunk.content = row.content;
    chunk.place = row.place;
    CHECK(chunk.settle(row.keep));
    CHECK_EQ(bool(chunk.memory), row.has_device);
    CHECK_EQ(bool(chunk.backup), row.has_host_memory);
    CHECK_EQ(bool(chunk.disk), row.has_file);
    CHECK_EQ(held().device_bytes, row.has_device ? kChunk : 0);
    CHECK_EQ(held().host_bytes(), row.has_host_memory ? kChunk : 0);
  }
}

TEST(the_state_follows_from_the_chunks) {
  constexpr Content D = Content::kDevice, H = Content::kBackup, N = Content::kNone;
  struct Row {
    std::vector<Content> chunks;
    State state;
  };
  for (const Row& row : {Row{{D, D, D}, State::kMapped}, Row{{H, H, H}, State::kOffloaded},
                         Row{{D, H, D}, State::kOffloaded}, Row{{N, D, H}, State::kOffloaded},
                         Row{{N, N, N}, State::kDiscarded}, Row{{D, N, D}, State::kDiscarded}}) {
    Allocation allocation = make();
    for (std::size_t i = 0; i < 3; ++i) allocation.chunks[i].content = row.chunks[i];
    CHECK(allocation.state() == row.state);
    allocation.trimmed = true;
    CHECK(allocation.state() == State::kTrimmed);
  }
}

TEST(release_can_be_repeated_after_any_of_its_calls_failed) {
  const device::Held before = held();
  const auto with_backup = [] {
    Allocation allocation = make();
    allocation.chunks[0].backup = camem::HostMemory::page_locked(kChunk, camem::HostSource::kAcl);
    return allocation;
  };
  Allocation sample = with_backup();
  const auto calls = calls_of([&] { sample.release(); });
  CHECK_EQ(calls.size(), 8u);  // unmap and free three chunks, unpin one, release the range
  for (const std::string& rule : device::single_faults(calls, device::kDriverError)) {
    Allocation allocation = with_backup();
    const Faults faults(rule);
    CHECK_THROWS(camem::AclError, allocation.release());
    CHECK(!(held() == before));
    allocation.release();
    CHECK_EQ(held(), before);
    allocation.release();  // nothing is left to free
  }
}

}  // namespace
