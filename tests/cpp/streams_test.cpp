// SPDX-License-Identifier: Apache-2.0
//
// Other streams and contexts besides ours: what operations wait for, what they do not, and what
// happens if something hangs.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "ascendcl/check.h"
#include "blocks.h"
#include "check.h"

using camem::Until;
using device::CallLog;
using device::Faults;
using device::held;
using device::kMiB;

namespace {

// A stream of a context that works on a block until it is released.
class Work {
 public:
  Work() { CHECK_EQ(aclrtCreateStream(&stream_), ACL_SUCCESS); }
  ~Work() {
    end();
    CHECK_EQ(aclrtDestroyStream(stream_), ACL_SUCCESS);
  }

  void begin(const Block& block, std::size_t bytes) {
    const npuSimRange range{block.address(), bytes};
    npuSimKernel wait = {};
    wait.name = "work of a test";
    wait.argument = this;
    wait.run = [](void* self) {
      while (!static_cast<Work*>(self)->ended_) std::this_thread::yield();
      return 0;
    };
    CHECK_EQ(npuSimLaunch(stream_, &wait, &range, 1), ACL_SUCCESS);
  }

  void end() {
    ended_ = true;
    npuSimDrain(stream_);
  }

  aclrtStream stream() const { return stream_; }

 private:
  aclrtStream stream_ = nullptr;
  std::atomic<bool> ended_{false};
};

aclrtContext current() {
  aclrtContext context = nullptr;
  CHECK_EQ(aclrtGetCurrentContext(&context), ACL_SUCCESS);
  return context;
}

// A context created by a user, which is current from then on.
class UsersContext {
 public:
  UsersContext() { CHECK_EQ(aclrtCreateContext(&context_, 0), ACL_SUCCESS); }
  ~UsersContext() { CHECK_EQ(aclrtDestroyContext(context_), ACL_SUCCESS); }
  UsersContext(const UsersContext&) = delete;
  UsersContext& operator=(const UsersContext&) = delete;

  aclrtContext get() const { return context_; }

 private:
  aclrtContext context_ = nullptr;
};

camem::Plan level_1() { return plan({{"weights", camem::Action::kOffload}}); }

void configure_impatient(bool prepared = true) {
  camem::Settings settings = small_settings();
  settings.device_timeout = std::chrono::seconds(2);
  settings.unprepared = prepared ? camem::Unprepared::kLock : camem::Unprepared::kStage;
  pool().configure(settings);
}

// The next launched copy hangs until the rules change.
constexpr const char* kHangs = "aclrtMemcpyAsync.work:1:delay_ms=1000000000";

void wait_until_nothing_is_stuck() {
  for (;;) {
    try {
      pool().trim({});
      return;
    } catch (const std::runtime_error&) {
      std::this_thread::yield();
    }
  }
}

}  // namespace

TEST(what_is_freed_while_its_stream_is_busy_goes_once_the_stream_is_idle) {
  configure();
  const device::Held before = held();
  Work work;
  Block staying("kv_cache", 2 * kMiB);
  {
    Block block("kv_cache", 2 * kMiB);
    work.begin(block, 2 * kMiB);
    CallLog log;
    pool().free(block.address(), work.stream());
    for (const std::string& call : log.calls()) CHECK(call.find("Synchronize") == call.npos);
  }
  CHECK_EQ(pool().allocations().size(), 1u);
  CHECK_EQ(held().mappings, before.mappings + 2);
  work.end();
  Block another("kv_cache", 2 * kMiB);
  CHECK_EQ(held().mappings, before.mappings + 2);
}

TEST(what_is_freed_goes_after_a_sleep_has_waited_whatever_its_stream_says) {
  configure();
  const device::Held before = held();
  Block staying("weights", 2 * kMiB);
  {
    Block block("kv_cache", 2 * kMiB);
    const Faults faults("aclrtStreamQuery:1:507899:*");
    pool().free(block.address(), nullptr);
    CHECK_EQ(held().mappings, before.mappings + 2);
    pool().sleep(level_1());
  }
  CHECK_EQ(held().mappings, before.mappings);
  CHECK_EQ(held().device_bytes, before.device_bytes);
  wake({"weights"});
  CHECK(staying.intact());
}

TEST(a_thread_without_a_context_is_left_in_that_of_torch) {
  configure();
  Block block("weights", 8 * kMiB);
  const aclrtContext torchs = current();
  pool().sleep(level_1());
  aclrtContext left = nullptr;
  std::thread([&] {
    wake({"weights"});
    aclrtGetCurrentContext(&left);
  }).join();
  CHECK_EQ(left, torchs);
  CHECK(block.intact());
}

// A stream is destroyed in its context alone.
TEST(streams_whose_context_cannot_be_set_end_with_it) {
  const auto streams = [] {
    npuSimCounters counters;
    npuSimGetCounters(&counters);
    return counters.streams;
  };
  const std::uint64_t before = streams();
  for (const auto& [rule, destroyed] : {std::pair{"", 5},
                                        {"aclrtSetCurrentContext:1:507899", 5},
                                        {"aclrtSetCurrentContext:1:507899:*", 0}}) {
    camem::Transfer transfer;
    transfer.open(0);
    CHECK_EQ(streams(), before + 5);
    const Faults faults(rule);
    const CallLog log;
    transfer.close();
    const std::vector<std::string> calls = log.calls();
    CHECK_EQ(std::count(calls.begin(), calls.end(), "aclrtDestroyStream"), destroyed);
    CHECK_EQ(std::count(calls.begin(), calls.end(), "aclrtDestroyContext"), 1);
    CHECK_EQ(streams(), before);
  }
}

TEST(what_is_freed_or_trimmed_while_prepared_is_not_in_the_report) {
  configure();
  Block staying("weights", 2 * kMiB), trimmed("weights", 4 * kMiB);
  for (const bool wakes : {false, true}) {
    auto freed = std::make_unique<Block>("weights", 8 * kMiB);
    if (wakes) {
      pool().sleep(level_1());
      pool().wake({pool().tag("weights")}, {}, Until::kPrepared);
    } else {
      pool().sleep(level_1(), {}, Until::kPrepared);
      pool().trim({reinterpret_cast<std::uintptr_t>(trimmed.address())});
    }
    freed.reset();
    const camem::Report report = pool().commit();
    const camem::Moved& moved = report.tags.at(pool().tag("weights"));
    CHECK_EQ(wakes ? moved.restored : moved.offloaded, 2 * kMiB);
    wake({"weights"});
    CHECK(staying.intact());
  }
}

TEST(what_was_trimmed_while_prepared_does_not_come_back) {
  configure();
  const device::Held before = held();
  {
    Block block("weights", 4 * kMiB);
    pool().sleep(level_1(), {}, Until::kPrepared);
    pool().trim({reinterpret_cast<std::uintptr_t>(block.address())});
    CHECK_EQ(pool().abort(), "");
    CHECK_EQ(held().device_bytes, before.device_bytes);
  }
  CHECK_EQ(held(), before);
}

TEST(a_thread_keeps_its_own_context) {
  configure();
  Block block("weights", 8 * kMiB);
  const aclrtContext torchs = current();
  const UsersContext users;
  const aclrtContext own = users.get();
  pool().sleep(level_1());
  CHECK_EQ(current(), own);
  wake({"weights"});
  CHECK_EQ(current(), own);
  pool().free(pool().allocate(2 * kMiB, 1), nullptr);  // on another device
  CHECK_EQ(current(), own);
  CHECK_EQ(aclrtSetCurrentContext(torchs), ACL_SUCCESS);
  CHECK(block.intact());
}

// Unmapping memory that work uses aborts the process.
TEST(a_sleep_waits_for_torch_and_for_the_callers_own_context) {
  configure();
  Block block("weights", 2 * kMiB);
  const aclrtContext torchs = current();
  const UsersContext users;
  const aclrtContext own = users.get();
  for (const aclrtContext context : {torchs, own}) {
    CHECK_EQ(aclrtSetCurrentContext(context), ACL_SUCCESS);
    Work work;
    work.begin(block, 2 * kMiB);
    CHECK_EQ(aclrtSetCurrentContext(own), ACL_SUCCESS);
    std::thread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      work.end();
    });
    pool().sleep(level_1());
    later.join();
    wake({"weights"});
    CHECK_EQ(aclrtSetCurrentContext(context), ACL_SUCCESS);
  }
  CHECK_EQ(aclrtSetCurrentContext(torchs), ACL_SUCCESS);
  CHECK(block.intact());
}

// AscendCL reports a failure once, to a wait for the stream or for its whole context.
TEST(nobody_who_waits_for_the_device_takes_the_failure_of_a_copy_away) {
  configure();
  Block block("weights", 32 * kMiB);
  std::atomic<bool> ended{false};
  std::atomic<aclError> told{ACL_SUCCESS};
  std::thread waits([&] {
    aclrtSetDevice(0);
    while (!ended) told = std::max<aclError>(told, aclrtSynchronizeDevice());
    aclrtResetDevice(0);
  });
  for (int nth = 1; nth <= 16; ++nth) {
    const Faults faults("aclrtMemcpyAsync.work:" + std::to_string(nth) + ":507899");
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1()));
    CHECK(block.intact());
  }
  ended = true;
  waits.join();
  CHECK_EQ(told, ACL_SUCCESS);
}

// A refused call during a capture may invalidate the capture, which its end reports.
TEST(memory_is_taken_and_freed_while_a_stream_captures_and_a_sleep_is_refused) {
  configure();
  Block block("weights", 4 * kMiB);
  const device::Held before = held();
  aclrtStream stream = nullptr;
  CHECK_EQ(aclrtCreateStream(&stream), ACL_SUCCESS);
  CHECK_EQ(aclmdlRICaptureBegin(stream, ACL_MODEL_RI_CAPTURE_MODE_GLOBAL), ACL_SUCCESS);
  void* taken = pool().allocate(2 * kMiB, 0);
  pool().free(pool().allocate(2 * kMiB, 0), stream);
  CHECK_EQ(held().mappings, before.mappings + 2);  // the stream cannot be queried
  const device::Held during = held();
  for (const Until until : {Until::kCommitted, Until::kPrepared}) {
    try {
      pool().sleep(level_1(), {}, until);
      CHECK(false);
    } catch (const camem::TransactionError& error) {
      CHECK(std::string(error.what()).find("captures a graph") != std::string::npos);
    }
  }
  CHECK_THROWS(camem::AclError, pool().trim({}));
  CHECK_EQ(held(), during);
  aclmdlRI graph = nullptr;
  CHECK_EQ(aclmdlRICaptureEnd(stream, &graph), ACL_SUCCESS);
  CHECK_EQ(aclmdlRIDestroy(graph), ACL_SUCCESS);
  CHECK_EQ(aclrtDestroyStream(stream), ACL_SUCCESS);
  pool().free(taken, nullptr);
  pool().sleep(level_1());
  wake({"weights"});
  CHECK(block.intact());
  CHECK_EQ(held().mappings, before.mappings);
}

TEST(work_that_never_ends_fails_a_sleep_that_touched_nothing) {
  configure_impatient();
  Block block("weights", 4 * kMiB);
  const device::Held before = held();
  Work work;
  work.begin(block, 2 * kMiB);
  try {
    pool().sleep(level_1());
    CHECK(false);
  } catch (const camem::TransactionError& error) {
    CHECK(std::string(error.what()).find("device_timeout_s") != std::string::npos);
    CHECK(std::string(error.what()).find("nothing was touched") != std::string::npos);
  }
  CHECK_EQ(held(), before);
  work.end();
  pool().sleep(level_1());
  wake({"weights"});
  CHECK(block.intact());
}

namespace {

// A sleep fails if a copy hangs, and the block stays as it was. Memory that the copy may still use
// is neither freed nor reused until it has completed.
void check_a_copy_out_hangs(bool prepared, Until until) {
  configure_impatient(prepared);
  const device::Held empty = held();
  {
    Block block("weights", 16 * kMiB);
    Faults faults(kHangs);
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1(), {}, until));
    CHECK(block.intact());
    CHECK(held().host_bytes() > empty.host_bytes());
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1()));
    CHECK_THROWS(camem::TransactionError, pool().wake({}, {}, Until::kPrepared));
    CHECK(block.intact());
    block.write(2);
    npuSimSetFaults("");  // the copy completes
    wait_until_nothing_is_stuck();
    pool().sleep(level_1());
    wake({"weights"});
    CHECK(block.intact());
  }
  CHECK_EQ(held(), empty);
}

// The same for a wake, which only has to roll back its mappings.
void check_a_copy_in_hangs(bool prepared) {
  configure_impatient(prepared);
  const device::Held empty = held();
  {
    Block block("weights", 16 * kMiB);
    pool().sleep(level_1());
    const device::Held asleep = held();
    Faults faults(kHangs);
    CHECK_THROWS(camem::TransactionError, wake({"weights"}));
    CHECK(held().device_bytes > asleep.device_bytes);
    CHECK_THROWS(camem::TransactionError, wake({"weights"}));
    npuSimSetFaults("");
    wait_until_nothing_is_stuck();
    CHECK_EQ(held().device_bytes, asleep.device_bytes);
    wake({"weights"});
    CHECK(block.intact());
  }
  CHECK_EQ(held(), empty);
}

}  // namespace

TEST(a_copy_out_that_never_ends) { check_a_copy_out_hangs(true, Until::kCommitted); }
TEST(a_copy_out_that_never_ends_while_prepared) { check_a_copy_out_hangs(true, Until::kPrepared); }
TEST(a_copy_out_through_a_block_that_never_ends) {
  check_a_copy_out_hangs(false, Until::kCommitted);
}
TEST(a_copy_in_that_never_ends) { check_a_copy_in_hangs(true); }
TEST(a_copy_in_through_a_block_that_never_ends) { check_a_copy_in_hangs(false); }

// Unmapping memory that a copy uses aborts the process.
TEST(of_two_hanging_copies_through_blocks_both_have_to_end) {
  camem::Settings settings = small_settings(4 * kMiB, 1);
  settings.device_timeout = std::chrono::seconds(1);
  settings.unprepared = camem::Unprepared::kStage;
  pool().configure(settings);
  const device::Held empty = held();
  {
    Block block("weights", 4 * kMiB);
    const Faults faults(std::string(kHangs) + ",aclrtMemcpyAsync.work:2:delay_ms=3000");
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1()));
    std::this_thread::sleep_for(std::chrono::seconds(3));  // the second one has completed
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1()));
  }
  CHECK(held().device_bytes > empty.device_bytes);
  wait_until_nothing_is_stuck();
  {
    const Block another("weights", 2 * kMiB);
  }  // the blocks are freed after it has completed
  CHECK_EQ(held(), empty);
}

// Any next operation rolls back a prepared sleep.
TEST(a_wake_that_cannot_roll_back_what_was_prepared_says_so) {
  configure();
  Block block("weights", 4 * kMiB);
  pool().sleep(level_1(), {}, Until::kPrepared);
  {
    const Faults faults("aclrtMapMem:1:507899");
    try {
      wake({"kv_cache"});
      CHECK(false);
    } catch (const camem::TransactionError& error) {
      CHECK(std::string(error.what()).find("comes back with wake_up") != std::string::npos);
    }
  }
  wake({"weights"});
  CHECK(block.intact());
}

TEST(memory_that_a_hanging_copy_uses_is_kept_though_torch_frees_it) {
  configure_impatient();
  const device::Held empty = held();
  {
    Block block("weights", 4 * kMiB);
    Faults faults(kHangs);
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1()));
    pool().free(block.address(), nullptr);
    CHECK(held().device_bytes > empty.device_bytes);
    CHECK(held().host_bytes() > empty.host_bytes());
  }
  wait_until_nothing_is_stuck();
  CHECK_EQ(held(), empty);
}

// With CUDA a launch waits while a block is being allocated.
TEST(preparing_makes_room_for_the_steps_of_a_model) {
  configure(true, 2 * kMiB, 4);
  Block block("weights", 16 * kMiB);
  const Faults slow("aclrtMallocHost:1:delay_ms=300");
  npuSimResetCounters();
  pool().step_begins();
  pool().prepare({pool().tag("weights")}, false);
  while (pool().host_info().prepared == 0) std::this_thread::yield();
  CHECK(!pool().wait_prepared(0.2));
  CHECK_EQ(npuSimCallCount("aclrtMallocHost"), 1u);  // one thread, which pauses for 15 s
  CHECK_EQ(pool().host_info().prepared, 2 * kMiB);
  pool().step_ends();
  CHECK(pool().wait_prepared(60));
  CHECK_EQ(pool().host_info().prepared, 16 * kMiB);
  pool().release_prepared();
  pool().prepare({}, false);
}

TEST(what_was_prepared_is_still_ready_after_a_failed_sleep) {
  configure();
  Block block("weights", 16 * kMiB);
  pool().prepare({pool().tag("weights")}, false);
  CHECK(pool().wait_prepared(60));
  CHECK_EQ(pool().host_info().prepared, 16 * kMiB);
  const device::Held before = held();
  for (const Until until : {Until::kCommitted, Until::kPrepared}) {
    const Faults faults("aclrtUnmapMem:3:507899");
    CHECK_THROWS(camem::TransactionError, pool().sleep(level_1(), {}, until));
    CHECK_EQ(pool().host_info().prepared, 16 * kMiB);
    CHECK_EQ(held(), before);
  }
  pool().release_prepared();
  pool().prepare({}, false);
}
