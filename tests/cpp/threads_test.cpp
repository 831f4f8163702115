// SPDX-License-Identifier: Apache-2.0
//
// Several threads allocate, use and free memory while others sleep and wake. As in an engine,
// sleeping content is not accessed; memory that stays is written at any time.
#include <atomic>
#include <chrono>
#include <future>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "ascendcl/check.h"
#include "blocks.h"
#include "check.h"
#include "pool/pool.h"

using camem::Action;
using device::kMiB;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int kThreads = 3, kRounds = 25;

camem::Plan level_1() {
  return plan({{"weights", Action::kOffload}, {"kv_cache", Action::kDiscard}});
}

// Waits for all tasks, and throws the first exception.
void run_all(const std::vector<std::function<void()>>& tasks) {
  std::vector<std::future<void>> running;
  for (const auto& task : tasks) {
    running.push_back(std::async(std::launch::async, [task] {
      aclrtSetDevice(0);
      task();
    }));
  }
  for (auto& one : running) one.wait();
  for (auto& one : running) one.get();
}

TEST(threads_allocate_write_and_free_while_another_sleeps_and_wakes) {
  configure();
  std::shared_mutex awake;
  std::atomic<int> working{kThreads};
  std::atomic<int> cycles{0};
  std::vector<std::function<void()>> tasks;
  for (int thread = 0; thread < kThreads; ++thread) {
    tasks.push_back([&, thread] {
      const std::shared_ptr<void> done(nullptr, [&](void*) { --working; });
      for (int round = 0; round < kRounds; ++round) {
        Block stays("stays", 2 * kMiB, thread * 100 + round);
        std::unique_ptr<Block> weights;
        {
          std::shared_lock<std::shared_mutex> lock(awake);
          weights = std::make_unique<Block>("weights", 4 * kMiB, thread * 1000 + round);
        }
        std::this_thread::yield();
        CHECK(stays.intact());
        {
          std::shared_lock<std::shared_mutex> lock(awake);
          CHECK(weights->intact());
        }
        if (round % 2 == 0) weights.reset();  // possibly while it sleeps
      }
    });
  }
  tasks.push_back([&] {
    while (working > 0) {
      std::unique_lock<std::shared_mutex> lock(awake);
      pool().sleep(level_1());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      wake({"weights", "kv_cache"});
      lock.unlock();
      ++cycles;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  run_all(tasks);
  CHECK(cycles > 0);
}

TEST(two_threads_that_sleep_and_wake_take_turns) {
  configure();
  Block weights("weights", 8 * kMiB), cache("kv_cache", 4 * kMiB);
  const auto cycle = [] {
    for (int round = 0; round < kRounds; ++round) {
      pool().sleep(level_1());
      wake({"weights", "kv_cache"});
    }
  };
  const auto look = [] {
    for (int round = 0; round < 4 * kRounds; ++round) {
      for (const camem::AllocationInfo& info : pool().allocations()) {
        const bool mapped = info.state == camem::State::kMapped;
        CHECK_EQ(info.device_bytes, mapped ? info.bytes : 0);  // no partial transaction
      }
      pool().tag_names();
      camem::page_locked_host_bytes();
    }
  };
  run_all({cycle, cycle, look});
  CHECK(weights.intact());
  CHECK_EQ(device::held().device_bytes, 12 * kMiB);
}

TEST(threads_free_while_another_gives_back_and_allocates_under_faults) {
  configure();
  std::vector<std::function<void()>> tasks;
  for (int thread = 0; thread < kThreads; ++thread) {
    tasks.push_back([thread] {
      for (int round = 0; round < kRounds; ++round) {
        try {
          pool().free(pool().allocate((1 + (thread + round) % 4) * 2 * kMiB, 0), nullptr);
        } catch (const camem::AclError&) {
        }
      }
    });
  }
  tasks.push_back([] {
    for (int round = 0; round < kRounds; ++round) {
      try {
        pool().sleep(level_1());
        wake({"weights"});
      } catch (const camem::TransactionError&) {
      }
    }
  });
  {
    const device::Faults faults(
        "aclrtMapMem:7:507899:3,aclrtUnmapMem:9:507899:4,aclrtFreePhysical:11:507899:5,"
        "aclrtReserveMemAddress:5:507899:2,aclrtSynchronizeDeviceWithTimeout:8:507899:4");
    run_all(tasks);
  }
  wake({});
}

TEST(an_allocation_during_a_sleep_waits_for_its_end) {
  configure();
  Block weights("weights", 2 * kMiB);
  const device::Faults slow("aclrtMemcpyAsync:1:delay_ms=300");
  npuSimResetCounters();
  auto sleeping = std::async(std::launch::async, [] { return pool().sleep(level_1()).seconds; });
  while (npuSimCallCount("aclrtMemcpyAsync") == 0) std::this_thread::yield();
  const Clock::time_point start = Clock::now();
  Block block("stays", 2 * kMiB, 5);
  const std::chrono::duration<double> waited = Clock::now() - start;
  CHECK(waited.count() > 0.1);
  CHECK(sleeping.get() > 0.25);
  CHECK(block.intact());
  CHECK(weights.info().state == camem::State::kOffloaded);
}

TEST(each_thread_has_its_own_tag) {
  configure();
  const camem::TagId mine = pool().tag("weights"), others = pool().tag("kv_cache");
  const camem::TagId before = pool().set_current_tag(mine);
  std::async(std::launch::async, [&] { CHECK_EQ(pool().set_current_tag(others), 0); }).get();
  CHECK_EQ(pool().set_current_tag(before), mine);
}

}  // namespace
