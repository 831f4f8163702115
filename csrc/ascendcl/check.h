// SPDX-License-Identifier: Apache-2.0
//
// Checked AscendCL calls: a failure becomes a typed error that names the call, the code, the bytes
// and the place.
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace camem {

class AclError : public std::runtime_error {
 public:
  AclError(std::string call, aclError code, std::size_t bytes, const std::string& detail);

  const std::string& call() const { return call_; }
  aclError code() const { return code_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::string call_;
  aclError code_;
  std::size_t bytes_;
};

// There is not enough memory. `needed` and `free` are bytes.
class OutOfMemory : public std::runtime_error {
 public:
  OutOfMemory(const std::string& message, std::size_t needed, std::size_t free)
      : std::runtime_error(message), needed_(needed), free_(free) {}

  std::size_t needed() const { return needed_; }
  std::size_t free() const { return free_; }

 private:
  std::size_t needed_;
  std::size_t free_;
};

// `free` is device-wide, and other processes change it.
class OutOfDeviceMemory : public OutOfMemory {
 public:
  using OutOfMemory::OutOfMemory;
};

// There is not enough host memory, or it cannot be pinned.
class OutOfHostMemory : public OutOfMemory {
 public:
  using OutOfMemory::OutOfMemory;
};

// Free bytes of the device, which other processes change; 0 if the query fails.
std::size_t free_device_bytes();

// Throws OutOfDeviceMemory or AclError for a code other than ACL_SUCCESS.
void check(aclError code, const char* expression, std::size_t bytes, const char* file, int line);

// For clean-up paths: reports a failed call on stderr.
void check_noexcept(aclError code, const char* expression, std::size_t bytes) noexcept;

}  // namespace camem

#define CAMEM_CHECK(expression, bytes) \
  ::camem::check((expression), #expression, (bytes), __FILE__, __LINE__)
#define CAMEM_CHECK_NOEXCEPT(expression, bytes) \
  ::camem::check_noexcept((expression), #expression, (bytes))
