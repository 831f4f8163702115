// SPDX-License-Identifier: Apache-2.0
//
// Two devices in one process: NPU_SIM_DEVICES=2.
#include "ascendcl/check.h"
#include "ascendcl/vmm.h"
#include "blocks.h"
#include "check.h"
#include "pool/pool.h"

using camem::Action;
using device::kMiB;

namespace {

camem::Plan level_1() { return plan({{"weights", Action::kOffload}}); }

TEST(the_device_guard_restores_the_device_before) {
  CHECK_EQ(device::current(), 0);
  {
    const camem::DeviceGuard guard(1);
    CHECK_EQ(device::current(), 1);
    const camem::DeviceGuard inner(0);
    CHECK_EQ(device::current(), 0);
  }
  CHECK_EQ(device::current(), 0);
}

TEST(allocations_sleep_and_wake_on_the_device_that_they_are_on) {
  configure();
  const std::size_t free[] = {device::free_bytes(0), device::free_bytes(1)};
  Block first("weights", 6 * kMiB, 1, 0), second("weights", 4 * kMiB, 2, 1);
  CHECK_EQ(device::current(), 0);
  CHECK_EQ(free[0] - device::free_bytes(0), 6 * kMiB);
  CHECK_EQ(free[1] - device::free_bytes(1), 4 * kMiB);
  const camem::Report report = pool().sleep(level_1());
  CHECK_EQ(report.tags.at(pool().tag("weights")).offloaded, 10 * kMiB);
  CHECK_EQ(device::free_bytes(0), free[0]);
  CHECK_EQ(device::free_bytes(1), free[1]);
  wake({"weights"});
  CHECK_EQ(device::current(), 0);
  CHECK_EQ(free[0] - device::free_bytes(0), 6 * kMiB);
  CHECK_EQ(free[1] - device::free_bytes(1), 4 * kMiB);
  CHECK(first.intact() && second.intact());
}

TEST(a_sleep_that_fails_on_the_second_device_is_undone_on_both) {
  configure(true, 2 * kMiB, 1);
  Block first("weights", 4 * kMiB, 1, 0), second("weights", 4 * kMiB, 2, 1);
  {
    const device::Faults faults("aclrtMemcpyAsync:4:507899");
    try {
      pool().sleep(level_1());
      CHECK(false);
    } catch (const camem::TransactionError& error) {
      CHECK_EQ(error.device(), 1);
    }
  }
  CHECK(first.info().state == camem::State::kMapped && first.intact());
  CHECK(second.info().state == camem::State::kMapped && second.intact());
  pool().sleep(level_1());
  wake({"weights"});
  CHECK(first.intact() && second.intact());
}

TEST(no_room_on_the_second_device_leaves_both_asleep) {
  configure();
  Block first("weights", 4 * kMiB, 1, 0), second("weights", 4 * kMiB, 2, 1);
  pool().sleep(level_1());
  {
    Block neighbour("stays", device::free_bytes(1), 3, 1);
    CHECK_THROWS(camem::TransactionError, wake({"weights"}));
    CHECK(first.info().state == camem::State::kOffloaded);
    CHECK_EQ(first.info().device_bytes, 0u);
  }
  wake({"weights"});
  CHECK(first.intact() && second.intact());
}

TEST(a_device_that_is_not_there_is_refused) {
  CHECK_THROWS(camem::AclError, pool().allocate(2 * kMiB, 2));
  CHECK_EQ(device::current(), 0);
}

}  // namespace
