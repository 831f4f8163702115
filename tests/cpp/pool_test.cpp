// SPDX-License-Identifier: Apache-2.0
//
// The result and the report of each operation of the pool on an allocation in each state.
#include "pool/pool.h"

#include <memory>

#include "ascendcl/check.h"
#include "blocks.h"
#include "check.h"

using camem::Action;
using camem::State;
using device::held;
using device::kMiB;

namespace {

constexpr std::size_t kBytes = 5 * kMiB;  // requested
constexpr std::size_t kHeld = 6 * kMiB;   // rounded up to the granularity
constexpr auto kKeep = Action::kKeep, kOffload = Action::kOffload, kDiscard = Action::kDiscard;

// A block in the given state, with a kept backup if it is mapped after a sleep.
std::unique_ptr<Block> block_in(State state) {
  auto block = std::make_unique<Block>("weights", kBytes);
  if (state == State::kOffloaded) pool().sleep(plan({{"weights", kOffload}}));
  if (state == State::kDiscarded) pool().sleep(plan({{"weights", kDiscard}}));
  if (state == State::kTrimmed) pool().trim({reinterpret_cast<std::uintptr_t>(block->address())});
  return block;
}

struct Row {
  const char* operation;
  State before;
  State after;
  std::size_t device_bytes, host_bytes;  // afterwards
};

constexpr State kMapped = State::kMapped, kOffloaded = State::kOffloaded,
                kDiscarded = State::kDiscarded, kTrimmed = State::kTrimmed;

constexpr Row kTable[] = {
    {"keep", kMapped, kMapped, kHeld, 0},
    {"keep", kOffloaded, kOffloaded, 0, kHeld},
    {"keep", kDiscarded, kDiscarded, 0, 0},
    {"keep", kTrimmed, kTrimmed, 0, 0},
    {"offload", kMapped, kOffloaded, 0, kHeld},
    {"offload", kOffloaded, kOffloaded, 0, kHeld},
    {"offload", kDiscarded, kDiscarded, 0, 0},
    {"offload", kTrimmed, kTrimmed, 0, 0},
    {"discard", kMapped, kDiscarded, 0, 0},
    {"discard", kOffloaded, kDiscarded, 0, 0},
    {"discard", kDiscarded, kDiscarded, 0, 0},
    {"discard", kTrimmed, kTrimmed, 0, 0},
    {"wake", kMapped, kMapped, kHeld, 0},
    {"wake", kOffloaded, kMapped, kHeld, kHeld},
    {"wake", kDiscarded, kMapped, kHeld, 0},
    {"wake", kTrimmed, kTrimmed, 0, 0},
    {"wake others", kOffloaded, kOffloaded, 0, kHeld},
    {"trim", kMapped, kTrimmed, 0, 0},
    {"trim", kOffloaded, kTrimmed, 0, 0},
    {"trim", kDiscarded, kTrimmed, 0, 0},
    {"trim", kTrimmed, kTrimmed, 0, 0},
};

void carry_out(const std::string& operation, const Block& block) {
  if (operation == "keep") pool().sleep(plan({{"weights", kKeep}}));
  if (operation == "offload") pool().sleep(plan({{"weights", kOffload}}));
  if (operation == "discard") pool().sleep(plan({{"weights", kDiscard}}));
  if (operation == "wake") wake({"weights"});
  if (operation == "wake others") wake({"kv_cache"});
  if (operation == "trim") pool().trim({reinterpret_cast<std::uintptr_t>(block.address())});
}

// Twice: the second time changes nothing.
void check_row(const Row& row) {
  const auto block = block_in(row.before);
  for (int time = 0; time < 2; ++time) {
    carry_out(row.operation, *block);
    const camem::AllocationInfo info = block->info();
    CHECK(info.state == row.after);
    CHECK_EQ(info.bytes, kHeld);
    CHECK_EQ(info.device_bytes, row.device_bytes);
    CHECK_EQ(info.host_bytes, row.host_bytes);
    CHECK_EQ(held().device_bytes, row.device_bytes);
    CHECK_EQ(held().handles, row.device_bytes / (2 * kMiB));
    CHECK_EQ(held().mappings, row.device_bytes / (2 * kMiB));
    CHECK_EQ(held().host_bytes(), row.host_bytes);
    const bool has_content = row.before != kDiscarded && row.after == kMapped;
    CHECK(!has_content || block->intact());
  }
  pool().free(block->address(), nullptr);
  CHECK_EQ(held().reservations, 0u);
  CHECK_EQ(held().host_bytes(), 0u);
  pool().free(block->address(), nullptr);  // unknown now: nothing happens
}

TEST(every_operation_in_every_state) {
  configure();
  for (const Row& row : kTable) {
    try {
      check_row(row);
    } catch (const std::logic_error& error) {
      throw std::logic_error(std::string(row.operation) + " of state " +
                             std::to_string(static_cast<int>(row.before)) + ": " + error.what());
    }
  }
}

TEST(without_a_kept_backup_a_wake_gives_host_memory_back) {
  configure(false);
  Block block("weights", kBytes);
  pool().sleep(plan({{"weights", kOffload}}));
  CHECK_EQ(held().host_bytes(), kHeld);
  wake({"weights"});
  CHECK_EQ(held().host_bytes(), 0u);
  CHECK(block.intact());
}

TEST(a_kept_backup_is_written_again_and_not_allocated_again) {
  configure();
  Block block("weights", kBytes);
  pool().sleep(plan({{"weights", kOffload}}));
  wake({"weights"});
  block.write(2);
  npuSimResetCounters();
  pool().sleep(plan({{"weights", kOffload}}));
  CHECK_EQ(npuSimCallCount("aclrtMallocHost"), 0u);
  wake({"weights"});
  CHECK(block.intact());
}

TEST(reports_give_the_bytes_of_each_tag) {
  configure();
  Block weights("weights", 6 * kMiB), cache("kv_cache", 4 * kMiB), runtime("runtime", 2 * kMiB);
  const camem::TagId w = pool().tag("weights"), k = pool().tag("kv_cache");
  camem::Report report = pool().sleep(plan({{"weights", kOffload}, {"kv_cache", kDiscard}}));
  CHECK_EQ(report.tags.size(), 2u);
  CHECK_EQ(report.tags[w].offloaded, 6 * kMiB);
  CHECK_EQ(report.tags[k].discarded, 4 * kMiB);
  CHECK(runtime.info().state == kMapped && runtime.intact());
  report = pool().wake({w, k}, {});
  CHECK_EQ(report.tags[w].restored, 6 * kMiB);
  CHECK_EQ(report.tags[k].remapped, 4 * kMiB);
  CHECK(pool().wake({w, k}, {}).tags.empty());
  CHECK(weights.intact());
}

TEST(a_tag_that_no_plan_names_is_never_lost) {
  configure();
  Block block("somebody else's", kBytes);
  camem::Plan level_2;
  level_2.actions[pool().tag("weights")] = kDiscard;
  pool().sleep(level_2);
  CHECK(block.info().state == kOffloaded);
  wake({"somebody else's"});
  CHECK(block.intact());
}

TEST(chunks_of_another_size_are_for_new_allocations_only) {
  configure(true, 2 * kMiB);
  Block before("weights", 8 * kMiB);
  configure(true, 3 * kMiB);  // rounded up to the granularity: 4 MiB
  Block after("weights", 10 * kMiB, 2);
  CHECK_EQ(held().handles, 4u + 3u);
  pool().sleep(plan({{"weights", kOffload}}));
  wake({"weights"});
  CHECK_EQ(held().handles, 4u + 3u);
  CHECK(before.intact() && after.intact());
}

TEST(out_of_device_memory_says_how_much_is_missing) {
  configure();
  const std::size_t free = device::free_bytes(0);
  CHECK_THROWS(camem::OutOfDeviceMemory, pool().allocate(free + 1, 0));
  CHECK_EQ(device::free_bytes(0), free);
  Block block("weights", kBytes);
  pool().sleep(plan({{"weights", kOffload}}));
  Block neighbour("kv_cache", free - 4 * kMiB);
  try {
    wake({"weights"});
    CHECK(false);
  } catch (const camem::TransactionError& error) {
    try {
      std::rethrow_exception(error.cause());
    } catch (const camem::OutOfDeviceMemory& cause) {
      CHECK_EQ(cause.needed(), kHeld);
      CHECK_EQ(cause.free(), 4 * kMiB);
    }
  }
  CHECK(block.info().state == kOffloaded);
  CHECK_EQ(block.info().device_bytes, 0u);
  pool().free(neighbour.address(), nullptr);
  wake({"weights"});
  CHECK(block.intact());
}

}  // namespace
