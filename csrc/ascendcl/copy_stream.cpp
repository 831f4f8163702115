// SPDX-License-Identifier: Apache-2.0
#include "ascendcl/copy_stream.h"

#include <algorithm>
#include <limits>

#include "ascendcl/check.h"
#include "ascendcl/newer.h"

namespace camem {
namespace {

// The wait for further copies after one has timed out.
constexpr std::chrono::milliseconds kMoment{1000};

}  // namespace

std::unique_ptr<CopyStream> CopyStream::create() noexcept {
  aclrtStream stream = nullptr;
  if (aclrtCreateStream(&stream) != ACL_SUCCESS) return nullptr;
  return std::unique_ptr<CopyStream>(new CopyStream(stream));
}

std::unique_ptr<CopyStream> CopyStream::default_of_context() {
  return std::unique_ptr<CopyStream>(new CopyStream(nullptr));
}

CopyStream::~CopyStream() {
  if (stream_ != nullptr) CAMEM_CHECK_NOEXCEPT(aclrtDestroyStream(stream_), 0);
}

void CopyStream::begin(Patience& patience) {
  std::lock_guard<std::mutex> lock(mutex_);
  patience_ = &patience;
  if (!stuck_) failure_ = ACL_SUCCESS;
}

void CopyStream::copy(std::byte* to, const std::byte* from, std::size_t bytes,
                      aclrtMemcpyKind kind) {
  launched_ += bytes;
  const aclError code = aclrtMemcpyAsync(to, bytes, from, bytes, kind, stream_);
  if (code == ACL_SUCCESS) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_ == ACL_SUCCESS) failure_ = code;
  }
  check(code, "aclrtMemcpyAsync", bytes, __FILE__, __LINE__);
}

bool CopyStream::is(aclrtStreamStatus wanted) noexcept {
  aclrtStreamStatus status = ACL_STREAM_STATUS_NOT_READY;
  return aclrtStreamQuery(stream_, &status) == ACL_SUCCESS && status == wanted;
}

// The lock must be held.
aclError CopyStream::synchronize() {
  const std::size_t launched = launched_;
  auto allowed = kMoment;
  if (patience_ != nullptr && !patience_->over) {
    const std::size_t in_flight = launched - done_;
    allowed = patience_->least + std::chrono::milliseconds(in_flight / patience_->bytes_per_ms);
  }
  const auto timeout =
      std::clamp<std::int64_t>(allowed.count(), 1, std::numeric_limits<std::int32_t>::max());
  aclError code = aclrtSynchronizeStreamWithTimeout(stream_, static_cast<std::int32_t>(timeout));
  if (code == kStreamSyncTimeout && is_idle()) {
    // AscendCL checks the clock before the stream, so a suspended process times out: try once more.
    code = aclrtSynchronizeStreamWithTimeout(stream_, static_cast<std::int32_t>(kMoment.count()));
  }
  if (code == ACL_SUCCESS) done_ = launched;
  if (code == kStreamSyncTimeout) {
    stuck_ = true;
    if (patience_ != nullptr) patience_->over = true;
  }
  return code;
}

void CopyStream::wait(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!stuck_) {
    const aclError code = synchronize();
    if (failure_ == ACL_SUCCESS) failure_ = code;
  }
  if (failure_ == kStreamSyncTimeout) {
    throw AclError(
        "aclrtSynchronizeStreamWithTimeout", failure_, bytes,
        "a copy has not ended in time (device_timeout_s); until it has, no memory sleeps "
        "or wakes");
  }
  check(failure_, "aclrtSynchronizeStreamWithTimeout", bytes, __FILE__, __LINE__);
}

void CopyStream::drain() noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int attempt = 0; attempt < 2 && !stuck_; ++attempt) {
    const aclError code = synchronize();
    if (code == ACL_SUCCESS) return;
    if (failure_ == ACL_SUCCESS) failure_ = code;
  }
  stuck_ = !is_idle();
}

void CopyStream::look_again() noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!is_idle()) return;
  synchronize();  // consumes the error of what was in flight
  done_ = launched_;
  stuck_ = false;
}

}  // namespace camem
