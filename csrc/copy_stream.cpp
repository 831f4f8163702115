// SPDX-License-Identifier: Apache-2.0
#include "copy_stream.h"

#include "acl_check.h"

namespace camem {

std::unique_ptr<CopyStream> CopyStream::create() noexcept {
  aclrtStream stream = nullptr;
  if (aclrtCreateStream(&stream) != ACL_SUCCESS) return nullptr;
  return std::unique_ptr<CopyStream>(new CopyStream(stream));
}

void CopyStream::begin() {
  std::lock_guard<std::mutex> lock(mutex_);
  failure_ = ACL_SUCCESS;
}

void CopyStream::copy(std::byte* to, const std::byte* from, std::size_t bytes,
                      aclrtMemcpyKind kind) {
  const aclError code = aclrtMemcpyAsync(to, bytes, from, bytes, kind, stream_);
  if (code == ACL_SUCCESS) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_ == ACL_SUCCESS) failure_ = code;
  }
  check(code, "aclrtMemcpyAsync", bytes, __FILE__, __LINE__);
}

bool CopyStream::is_busy() {
  aclrtStreamStatus status = ACL_STREAM_STATUS_COMPLETE;
  CAMEM_CHECK(aclrtStreamQuery(stream_, &status), 0);
  return status == ACL_STREAM_STATUS_NOT_READY;
}

void CopyStream::wait(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const aclError code = aclrtSynchronizeStream(stream_);
  if (failure_ == ACL_SUCCESS) failure_ = code;
  check(failure_, "aclrtSynchronizeStream", bytes, __FILE__, __LINE__);
}

void CopyStream::drain() noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  const aclError code = aclrtSynchronizeStream(stream_);
  if (code == ACL_SUCCESS) return;
  if (failure_ == ACL_SUCCESS) failure_ = code;
  if (aclrtSynchronizeStream(stream_) == ACL_SUCCESS) return;
  CAMEM_CHECK_NOEXCEPT(aclrtSynchronizeDevice(), 0);
}

}  // namespace camem
