// SPDX-License-Identifier: Apache-2.0
//
// A file for backups: preallocated, and without a name, so that it ends with the process.
//
// Requests bypass the page cache (O_DIRECT) where the file system and the memory allow it. Where
// not, each request writes back and drops what it has put into the cache, so that host memory stays
// free either way.
#pragma once

#include <atomic>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace camem {

// The disk refused, or returned something else than was written. `needed` and `free` are bytes, and
// 0 unless space is short.
class DiskError : public std::runtime_error {
 public:
  explicit DiskError(const std::string& message, std::size_t needed = 0, std::size_t free = 0)
      : std::runtime_error(message), needed_(needed), free_(free) {}

  std::size_t needed() const { return needed_; }
  std::size_t free() const { return free_; }

 private:
  std::size_t needed_;
  std::size_t free_;
};

class DiskFile {
 public:
  // All space is taken here, except on file systems that cannot preallocate. Throws DiskError.
  DiskFile(const std::string& directory, std::size_t bytes);
  ~DiskFile();
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;

  // Thread-safe. Both go on after interrupts and short transfers. Throw DiskError.
  void write(const std::byte* data, std::size_t bytes, std::size_t offset);
  void read(std::byte* data, std::size_t bytes, std::size_t offset);

  // Waits until the disk has everything. Errors that writing has delayed are thrown here.
  void sync();

  // Gives back the space of a part, where the file system can.
  void forget(std::size_t bytes, std::size_t offset) noexcept;

  const std::string& directory() const { return directory_; }

 private:
  template <class Call>
  void transfer(const char* what, std::size_t bytes, std::size_t offset, const Call& call);
  void preallocate(std::size_t bytes);
  void use_page_cache(const std::string& why);
  void empty_page_cache(std::size_t bytes, std::size_t offset);
  [[noreturn]] void fail(const char* what, int error, std::size_t bytes, std::size_t offset);

  const std::string directory_;
  int fd_ = -1;
  std::atomic<bool> direct_{true};
};

// Why the requests of the last file went through the page cache; empty if they did not.
std::string why_not_direct();

}  // namespace camem
