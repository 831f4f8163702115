// SPDX-License-Identifier: Apache-2.0
#include <acl/acl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "error.h"
#include "faults.h"
#include "state/captures.h"
#include "state/context.h"
#include "state/machine.h"
#include "state/memory.h"
#include "state/page_locks.h"
#include "state/work.h"

using sim::device::Direction;

namespace {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  Direction direction;

  const void* host() const {  // null if both sides are on the device
    return direction == Direction::kHostToDevice   ? from
           : direction == Direction::kDeviceToHost ? to
                                                   : nullptr;
  }
};

struct Sides {
  bool from_device;
  bool to_device;
};

// From the kind, or for ACL_MEMCPY_DEFAULT from the addresses.
aclError find_sides(const char* call, const void* to, const void* from, aclrtMemcpyKind kind,
                    Sides* sides) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST:
      *sides = {false, false};
      break;
    case ACL_MEMCPY_HOST_TO_DEVICE:
    case ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE:
      *sides = {false, true};
      break;
    case ACL_MEMCPY_DEVICE_TO_HOST:
      *sides = {true, false};
      break;
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
      *sides = {true, true};
      break;
    case ACL_MEMCPY_DEFAULT:
      *sides = {sim::touches_device(from, 1), sim::touches_device(to, 1)};
      break;
    default:
      return sim::fail(ACL_ERROR_INVALID_PARAM, "%s: unknown kind %d", call, kind);
  }
  SIM_REQUIRE(sides->from_device || sides->to_device, ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "%s: copies from host to host are not supported", call);
  return ACL_SUCCESS;
}

aclError check_side(const char* call, const char* side, const void* address, size_t bytes,
                    bool on_device) {
  if (on_device) {
    SIM_REQUIRE(sim::is_device_range(address, bytes), ACL_ERROR_RT_PARAM_INVALID,
                "%s: the %s [%p, +%zu) is not mapped device memory", call, side, address, bytes);
  } else {
    SIM_REQUIRE(!sim::touches_device(address, bytes), ACL_ERROR_RT_PARAM_INVALID,
                "%s: the %s [%p, +%zu) is device memory, the kind says host", call, side, address,
                bytes);
  }
  return ACL_SUCCESS;
}

aclError check_copy(const char* call, void* to, size_t room, const void* from, size_t bytes,
                    aclrtMemcpyKind kind, Copy* copy) {
  SIM_REQUIRE(to != nullptr && from != nullptr, ACL_ERROR_INVALID_PARAM, "%s: null address", call);
  SIM_REQUIRE(bytes > 0, ACL_ERROR_RT_PARAM_INVALID, "%s: count is 0", call);
  SIM_REQUIRE(bytes <= room, ACL_ERROR_RT_PARAM_INVALID, "%s: count %zu is more than destMax %zu",
              call, bytes, room);
  Sides sides = {};
  if (aclError error = find_sides(call, to, from, kind, &sides)) return error;
  if (aclError error = check_side(call, "source", from, bytes, sides.from_device)) return error;
  if (aclError error = check_side(call, "destination", to, bytes, sides.to_device)) return error;
  Direction direction = !sides.from_device ? Direction::kHostToDevice
                        : sides.to_device  ? Direction::kDeviceToDevice
                                           : Direction::kDeviceToHost;
  *copy = {to, from, bytes, direction};
  return ACL_SUCCESS;
}

constexpr size_t kPage = 4096;
constexpr int kOfAnotherPage = 0x7f;

// The device uses the old address of a host page that is not locked, and copies what is there now.
// No error is reported: one page of the destination is wrong. No bytes if all pages are locked.
struct MovedPage {
  void* address;
  size_t bytes;
};

MovedPage moved_page(const Copy& copy) {
  const void* host = copy.host();
  const size_t locked = host == nullptr ? copy.bytes : sim::locked_bytes(host, copy.bytes);
  return {static_cast<char*>(copy.to) + locked, std::min(kPage, copy.bytes - locked)};
}

// Pageable memory: waits for the stream's work, then copies synchronously.
aclError copy_at_once(const char* call, const Copy& copy, sim::Stream& stream) {
  SIM_REQUIRE(stream.captured() == nullptr, ACL_ERROR_RT_PARAM_INVALID,
              "%s: stream %d captures a graph, which takes no copies of host memory that is not "
              "page-locked",
              call, stream.id);
  if (aclError error = sim::refuse_updating(call, stream)) return error;
  sim::wait(stream, -1);
  if (aclError error = sim::take_failure(call, stream)) return error;
  aclError refused =
      sim::refuse_waiting_copy(call, *stream.context, ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC);
  if (refused != ACL_SUCCESS) return refused;
  sim::device::copy(stream.context->physical, copy.to, copy.from, copy.bytes, copy.direction);
  return ACL_SUCCESS;
}

// The stream waits, not the caller.
void delay(sim::Stream& stream, const sim::faults::Hit& hit) {
  auto wait = [](void* hit) {
    std::unique_ptr<sim::faults::Hit>(static_cast<sim::faults::Hit*>(hit))->wait();
  };
  sim::device::submit_call(stream.queue, wait, new sim::faults::Hit(hit));
}

// A fault of "aclrtMemcpyAsync.work" lets the launch succeed and the copy fail; an event after it
// does not report that. A delay of it delays the copy on the device.
sim::faults::Hit hit_of_work() {
  static sim::faults::Call work("aclrtMemcpyAsync.work");
  return work.hit();
}

uint64_t submit_to_device(const Copy& copy, sim::Stream& stream) {
  sim::faults::Hit hit = hit_of_work();
  if (hit.delay_ms > 0) delay(stream, hit);
  if (hit.code != 0) {
    stream.failure = hit.code;
    return sim::device::submitted(stream.queue);
  }
  uint64_t ticket =
      sim::device::submit_copy(stream.queue, copy.to, copy.from, copy.bytes, copy.direction);
  const MovedPage page = moved_page(copy);
  if (page.bytes == 0) return ticket;
  return sim::device::submit_fill(stream.queue, page.address, kOfAnotherPage, page.bytes);
}

// In a graph.
int copy_on_device(const Copy& copy, int device) {
  sim::faults::Hit hit = hit_of_work();
  hit.wait();
  if (hit.code != 0) return hit.code;
  sim::device::copy(device, copy.to, copy.from, copy.bytes, copy.direction);
  const MovedPage page = moved_page(copy);
  std::memset(page.address, kOfAnotherPage, page.bytes);
  return ACL_SUCCESS;
}

aclError submit(const char* call, const Copy& copy, sim::Stream& stream) {
  // Like the runtime, only by the address of the first byte.
  const void* host = copy.host();
  if (host != nullptr && !sim::is_known_host(host)) return copy_at_once(call, copy, stream);
  sim::Work work;
  work.ranges = {{copy.to, copy.bytes, copy.to != host},
                 {copy.from, copy.bytes, copy.from != host}};
  work.submit = [copy](sim::Stream& stream) { return submit_to_device(copy, stream); };
  work.run = [copy, device = stream.context->physical] { return copy_on_device(copy, device); };
  return sim::give(call, stream, std::move(work));
}

aclError submit_all(const char* call, const std::vector<Copy>& copies, sim::Stream& stream) {
  for (const Copy& copy : copies) {
    if (aclError error = submit(call, copy, stream)) return error;
  }
  return ACL_SUCCESS;
}

aclError check_fill(const char* call, void* address, size_t room, size_t bytes) {
  SIM_REQUIRE(address != nullptr && bytes > 0, ACL_ERROR_RT_PARAM_INVALID,
              "%s: null address or count 0", call);
  SIM_REQUIRE(bytes <= room, ACL_ERROR_RT_PARAM_INVALID, "%s: count %zu is more than maxCount %zu",
              call, bytes, room);
  SIM_REQUIRE(sim::is_device_range(address, bytes), ACL_ERROR_RT_PARAM_INVALID,
              "%s: [%p, +%zu) is not mapped device memory", call, address, bytes);
  return ACL_SUCCESS;
}

aclError check_rows(const char* call, size_t to_pitch, size_t from_pitch, size_t width,
                    size_t height) {
  SIM_REQUIRE(width > 0 && height > 0 && width <= to_pitch && width <= from_pitch,
              ACL_ERROR_RT_PARAM_INVALID,
              "%s: width %zu, height %zu, pitches %zu and %zu do not fit together", call, width,
              height, to_pitch, from_pitch);
  return ACL_SUCCESS;
}

constexpr size_t kBatchLimit = 4096;

aclError check_batch(const char* call, void** to, size_t* rooms, void** from, size_t* sizes,
                     size_t count, aclrtMemcpyBatchAttr* attributes, size_t attribute_count,
                     size_t* failed, std::vector<Copy>* copies) {
  if (failed != nullptr) *failed = SIZE_MAX;
  SIM_REQUIRE(count > 0 && count <= kBatchLimit, ACL_ERROR_RT_PARAM_INVALID,
              "%s: %zu copies, from 1 to %zu are possible", call, count, kBatchLimit);
  SIM_REQUIRE(attributes != nullptr && attribute_count > 0, ACL_ERROR_RT_PARAM_INVALID,
              "%s: no attributes", call);
  for (size_t i = 0; i < count; ++i) {
    Copy copy;
    aclError error =
        check_copy(call, to[i], rooms[i], from[i], sizes[i], ACL_MEMCPY_DEFAULT, &copy);
    if (error == ACL_SUCCESS && !copies->empty() && copy.direction != copies->front().direction) {
      error = sim::fail(ACL_ERROR_RT_PARAM_INVALID, "%s: copies of several directions", call);
    }
    if (error != ACL_SUCCESS) {
      if (failed != nullptr) *failed = i;
      return error;
    }
    copies->push_back(copy);
  }
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  SIM_CALL();
  SIM_CONTEXT(context);
  Copy copy;
  if (aclError error = check_copy("aclrtMemcpy", to, room, from, bytes, kind, &copy)) return error;
  if (aclError error = sim::refuse_waiting_copy(__func__, *context)) return error;
  sim::device::copy(context->physical, copy.to, copy.from, copy.bytes, copy.direction);
  return context->failure(__func__);
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes,
                          aclrtMemcpyKind kind, aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream("aclrtMemcpyAsync", handle, &stream)) return error;
  Copy copy;
  aclError error = check_copy("aclrtMemcpyAsync", to, room, from, bytes, kind, &copy);
  return error != ACL_SUCCESS ? error : submit("aclrtMemcpyAsync", copy, *stream);
}

aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t bytes,
                                       aclrtMemcpyKind kind, aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream(__func__, handle, &stream)) return error;
  Copy copy;
  aclError error = check_copy(__func__, to, room, from, bytes, kind, &copy);
  return error != ACL_SUCCESS ? error : submit(__func__, copy, *stream);
}

aclError aclrtMemcpy2d(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                       size_t height, aclrtMemcpyKind kind) {
  SIM_CALL();
  SIM_CONTEXT(context);
  if (aclError error = check_rows(__func__, to_pitch, from_pitch, width, height)) return error;
  std::vector<Copy> rows(height);
  for (size_t row = 0; row < height; ++row) {
    aclError error =
        check_copy(__func__, static_cast<char*>(to) + row * to_pitch, width,
                   static_cast<const char*>(from) + row * from_pitch, width, kind, &rows[row]);
    if (error != ACL_SUCCESS) return error;
  }
  if (aclError error = sim::refuse_waiting_copy(__func__, *context)) return error;
  for (const Copy& row : rows) {
    sim::device::copy(context->physical, row.to, row.from, row.bytes, row.direction);
  }
  return ACL_SUCCESS;
}

aclError aclrtMemcpy2dAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                            size_t width, size_t height, aclrtMemcpyKind kind, aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream(__func__, handle, &stream)) return error;
  if (aclError error = check_rows(__func__, to_pitch, from_pitch, width, height)) return error;
  std::vector<Copy> rows(height);
  for (size_t row = 0; row < height; ++row) {
    aclError error =
        check_copy(__func__, static_cast<char*>(to) + row * to_pitch, width,
                   static_cast<const char*>(from) + row * from_pitch, width, kind, &rows[row]);
    if (error != ACL_SUCCESS) return error;
  }
  return submit_all(__func__, rows, *stream);
}

aclError aclrtMemcpyBatch(void** to, size_t* rooms, void** from, size_t* sizes, size_t count,
                          aclrtMemcpyBatchAttr* attributes, size_t*, size_t attribute_count,
                          size_t* failed) {
  SIM_CALL();
  SIM_CONTEXT(context);
  std::vector<Copy> copies;
  aclError error = check_batch("aclrtMemcpyBatch", to, rooms, from, sizes, count, attributes,
                               attribute_count, failed, &copies);
  if (error != ACL_SUCCESS) return error;
  if (aclError refused = sim::refuse_waiting_copy(__func__, *context)) return refused;
  for (const Copy& copy : copies) {
    sim::device::copy(context->physical, copy.to, copy.from, copy.bytes, copy.direction);
  }
  return ACL_SUCCESS;
}

aclError aclrtMemcpyBatchAsync(void** to, size_t* rooms, void** from, size_t* sizes, size_t count,
                               aclrtMemcpyBatchAttr* attributes, size_t*, size_t attribute_count,
                               size_t* failed, aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream("aclrtMemcpyBatchAsync", handle, &stream)) return error;
  std::vector<Copy> copies;
  aclError error = check_batch("aclrtMemcpyBatchAsync", to, rooms, from, sizes, count, attributes,
                               attribute_count, failed, &copies);
  if (error != ACL_SUCCESS) return error;
  return submit_all("aclrtMemcpyBatchAsync", copies, *stream);
}

aclError aclrtMemset(void* address, size_t room, int32_t value, size_t bytes) {
  SIM_CALL();
  SIM_CONTEXT(context);
  if (aclError error = check_fill("aclrtMemset", address, room, bytes)) return error;
  if (aclError error = sim::refuse_waiting_copy(__func__, *context)) return error;
  sim::device::fill(context->physical, address, value, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* address, size_t room, int32_t value, size_t bytes,
                          aclrtStream handle) {
  SIM_CALL();
  std::shared_ptr<sim::Stream> stream;
  if (aclError error = sim::find_stream("aclrtMemsetAsync", handle, &stream)) return error;
  if (aclError error = check_fill("aclrtMemsetAsync", address, room, bytes)) return error;
  sim::Work work;
  work.ranges = {{address, bytes, true}};
  work.submit = [=](sim::Stream& stream) {
    return sim::device::submit_fill(stream.queue, address, value, bytes);
  };
  work.run = [=, device = stream->context->physical] {
    sim::device::fill(device, address, value, bytes);
    return ACL_SUCCESS;
  };
  return sim::give(__func__, *stream, std::move(work));
}

}  // extern "C"
