// SPDX-License-Identifier: Apache-2.0
//
// Values in device memory that streams write and wait for.
#include <acl/acl.h>
#include <time.h>

#include <utility>

#include "error.h"
#include "faults.h"
#include "state/context.h"
#include "state/memory.h"
#include "state/work.h"

using sim::Stream;

namespace {

using Value = volatile uint64_t;

aclError check_address(const char* call, const void* address) {
  SIM_REQUIRE(address != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null address", call);
  SIM_REQUIRE(reinterpret_cast<uintptr_t>(address) % sizeof(uint64_t) == 0,
              ACL_ERROR_RT_ADDR_UNALIGNED, "%s: %p is not a multiple of 8", call, address);
  SIM_REQUIRE(sim::is_device_range(address, sizeof(uint64_t)), ACL_ERROR_RT_PARAM_INVALID,
              "%s: %p is not mapped device memory", call, address);
  return ACL_SUCCESS;
}

bool is_reached(uint64_t seen, uint64_t value, uint32_t flag) {
  switch (flag) {
    case ACL_STREAM_WAIT_VALUE_GEQ:
      return static_cast<int64_t>(seen - value) >= 0;
    case ACL_STREAM_WAIT_VALUE_EQ:
      return seen == value;
    case ACL_STREAM_WAIT_VALUE_AND:
      return (seen & value) != 0;
    default:  // NOR
      return ~(seen | value) != 0;
  }
}

aclError give(const char* call, aclrtStream handle, void* address, std::function<int()> run) {
  std::shared_ptr<Stream> stream;
  if (aclError error = sim::find_stream(call, handle, &stream)) return error;
  sim::Work work;
  work.ranges = {{address, sizeof(uint64_t), true}};
  work.run = std::move(run);
  return sim::give(call, *stream, std::move(work));
}

}  // namespace

extern "C" {

aclError aclrtValueWrite(void* address, uint64_t value, uint32_t flag, aclrtStream handle) {
  SIM_CALL();
  if (aclError error = check_address(__func__, address)) return error;
  SIM_REQUIRE(flag == 0, ACL_ERROR_RT_PARAM_INVALID, "%s: flag %u", __func__, flag);
  return give(__func__, handle, address, [=] {
    *static_cast<Value*>(address) = value;
    return ACL_SUCCESS;
  });
}

aclError aclrtValueWait(void* address, uint64_t value, uint32_t flag, aclrtStream handle) {
  SIM_CALL();
  if (aclError error = check_address(__func__, address)) return error;
  SIM_REQUIRE(flag <= ACL_STREAM_WAIT_VALUE_NOR, ACL_ERROR_RT_PARAM_INVALID, "%s: flag %u",
              __func__, flag);
  return give(__func__, handle, address, [=] {
    constexpr timespec kPause = {0, 100000};
    while (!is_reached(*static_cast<Value*>(address), value, flag)) nanosleep(&kPause, nullptr);
    return ACL_SUCCESS;
  });
}

}  // extern "C"
