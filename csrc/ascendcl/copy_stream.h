// SPDX-License-Identifier: Apache-2.0
//
// A stream that carries copies of several threads. Its context must be current on whoever calls.
#pragma once

#include <acl/acl.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>

namespace camem {

// How long the streams of an operation are waited for: `least`, and what a slow link that all of
// them share would need for what is in flight.
struct Patience {
  std::chrono::milliseconds least{0};
  std::size_t bytes_per_ms = 1;   // of each stream
  std::atomic<bool> over{false};  // one did not end in time: the others have had theirs
};

class CopyStream {
 public:
  // Of the current context; null where its device gives no more streams.
  static std::unique_ptr<CopyStream> create() noexcept;
  // The stream that the current context has from the start.
  static std::unique_ptr<CopyStream> default_of_context();
  ~CopyStream();
  CopyStream(const CopyStream&) = delete;
  CopyStream& operator=(const CopyStream&) = delete;

  // Takes the failure of an earlier operation back, and begins one whose streams share `patience`.
  void begin(Patience& patience);

  // Launches a copy. Throws AclError; a part of the copy may be in flight then.
  void copy(std::byte* to, const std::byte* from, std::size_t bytes, aclrtMemcpyKind kind);

  // Returns when all that was launched before is done, `bytes` of it by the caller. Throws AclError
  // if any work failed since begin(), or takes too long: AscendCL tells only one of the threads
  // that wait, and not whose work it was.
  void wait(std::size_t bytes);

  // Waits until nothing is in flight. Whoever waits afterwards learns of a failure.
  void drain() noexcept;

  bool is_idle() noexcept;  // false also where AscendCL cannot tell

  // Something took too long, or AscendCL could not tell that it has ended: it may run at any time
  // to come, and nobody may unmap, reuse or free memory that it uses. Such a stream launches
  // nothing until look_again() finds it idle.
  bool is_stuck() const { return stuck_; }
  void look_again() noexcept;

 private:
  explicit CopyStream(aclrtStream stream) : stream_(stream) {}
  aclError synchronize();

  const aclrtStream stream_;  // null: the context's own
  std::mutex mutex_;          // of waiting
  aclError failure_ = ACL_SUCCESS;
  Patience* patience_ = nullptr;
  std::atomic<std::size_t> launched_{0};  // bytes
  std::size_t done_ = 0;                  // of them
  std::atomic<bool> stuck_{false};
};

}  // namespace camem
