// SPDX-License-Identifier: Apache-2.0
#include "transfer.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "acl_check.h"

namespace camem {
namespace {

void copy(Direction direction, const Chunk& chunk, aclrtStream stream) {
  const bool offload = direction == Direction::kDeviceToHost;
  std::byte* target = offload ? chunk.backup.data() : chunk.address;
  const std::byte* source = offload ? chunk.address : chunk.backup.data();
  CAMEM_CHECK(aclrtMemcpyAsync(target, chunk.bytes, source, chunk.bytes,
                               offload ? ACL_MEMCPY_DEVICE_TO_HOST : ACL_MEMCPY_HOST_TO_DEVICE,
                               stream),
              chunk.bytes);
  try {
    CAMEM_CHECK(aclrtSynchronizeStream(stream), chunk.bytes);
  } catch (...) {
    // The copy may still run: nobody may unmap or reuse its memory before it has ended.
    CAMEM_CHECK_NOEXCEPT(aclrtSynchronizeStream(stream), chunk.bytes);
    throw;
  }
}

}  // namespace

std::vector<aclrtStream>& Transfer::streams(int device, unsigned count) {
  std::vector<aclrtStream>& streams = streams_[device];
  while (streams.size() < count) {
    aclrtStream stream = nullptr;
    CAMEM_CHECK(aclrtCreateStream(&stream), 0);
    streams.push_back(stream);
  }
  return streams;
}

void Transfer::run(int device, Direction direction, const std::vector<Chunk*>& chunks,
                   unsigned threads, const Step& before, const Step& after,
                   std::size_t* failed_index) {
  if (chunks.empty()) return;
  threads = std::max(1u, std::min<unsigned>(threads, chunks.size()));
  const std::vector<aclrtStream>& streams = this->streams(device, threads);

  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  const auto work = [&](unsigned thread) {
    std::size_t index = 0;
    try {
      DeviceGuard guard(device);
      while (!failed && (index = next++) < chunks.size()) {
        before(index);
        copy(direction, *chunks[index], streams[thread]);
        after(index);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failed.exchange(true)) {
        error = std::current_exception();
        *failed_index = std::min(index, chunks.size() - 1);
      }
    }
  };

  std::vector<std::thread> others;
  try {
    for (unsigned thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // The machine gives no more threads: go on with those that there are.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace camem
