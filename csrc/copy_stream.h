// SPDX-License-Identifier: Apache-2.0
//
// A stream that carries copies of several threads.
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <memory>
#include <mutex>

namespace camem {

class CopyStream {
 public:
  // Of the current device; null where it gives no more streams.
  static std::unique_ptr<CopyStream> create() noexcept;

  // Takes the failure of an earlier operation back.
  void begin();

  // Launches a copy. Throws AclError; a part of the copy may be in flight then.
  void copy(std::byte* to, const std::byte* from, std::size_t bytes, aclrtMemcpyKind kind);

  // Returns when all that was launched before is done, `bytes` of it by the caller. Throws AclError
  // if any work failed since begin(): AscendCL tells only one of the threads that wait, and not
  // whose work it was.
  void wait(std::size_t bytes);

  // Waits until nothing is in flight: nobody may unmap or reuse memory under a copy that still
  // runs.
  // Whoever waits afterwards learns of a failure.
  void drain() noexcept;

  bool is_busy();  // throws AclError

 private:
  explicit CopyStream(aclrtStream stream) : stream_(stream) {}

  std::mutex mutex_;  // of waiting
  const aclrtStream stream_;
  aclError failure_ = ACL_SUCCESS;
};

}  // namespace camem
