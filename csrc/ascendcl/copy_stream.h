// SPDX-License-Identifier: Apache-2.0
//
// A stream for copies of several threads. Its context must be current on the calling thread.
#pragma once

#include <acl/acl.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>

namespace camem {

// How long an operation waits for its streams: `least`, plus the time that a slow link shared by
// all of them would need for what is in flight.
struct Patience {
  std::chrono::milliseconds least{0};
  std::size_t bytes_per_ms = 1;   // of each stream
  std::atomic<bool> over{false};  // one stream timed out, so the others get little more time
};

class CopyStream {
 public:
  // In the current context; null if the device has no stream left.
  static std::unique_ptr<CopyStream> create() noexcept;
  // The current context's default stream.
  static std::unique_ptr<CopyStream> default_of_context();
  ~CopyStream();
  CopyStream(const CopyStream&) = delete;
  CopyStream& operator=(const CopyStream&) = delete;

  // Discards the error of an earlier operation, and begins one whose streams share `patience`.
  void begin(Patience& patience);

  // Launches a copy. Throws AclError; part of the copy may be in flight then.
  void copy(std::byte* to, const std::byte* from, std::size_t bytes, aclrtMemcpyKind kind);

  // Waits for everything launched before, of which the caller launched `bytes`. Throws AclError if
  // any work has failed since begin() or takes too long: AscendCL reports an error to only one of
  // the waiting threads, and does not say whose work it was.
  void wait(std::size_t bytes);

  // Waits until nothing is in flight. A later wait() reports a failure.
  void drain() noexcept;

  // Both false where AscendCL cannot tell.
  bool is_idle() noexcept { return is(ACL_STREAM_STATUS_COMPLETE); }
  bool is_busy() noexcept { return is(ACL_STREAM_STATUS_NOT_READY); }

  // A copy timed out, or AscendCL could not tell whether it has completed. It may still run, so the
  // memory that it uses must not be unmapped, reused or freed. A stuck stream launches nothing
  // until look_again() finds it idle.
  bool is_stuck() const { return stuck_; }
  void look_again() noexcept;

  // Its context is about to be destroyed, which destroys it too.
  void ends_with_context() noexcept { stream_ = nullptr; }

 private:
  explicit CopyStream(aclrtStream stream) : stream_(stream) {}
  aclError synchronize();
  bool is(aclrtStreamStatus wanted) noexcept;

  aclrtStream stream_;  // null: the context's own
  std::mutex mutex_;    // of waiting
  aclError failure_ = ACL_SUCCESS;
  Patience* patience_ = nullptr;
  std::atomic<std::size_t> launched_{0};  // bytes
  std::size_t done_ = 0;                  // bytes
  std::atomic<bool> stuck_{false};
};

}  // namespace camem
