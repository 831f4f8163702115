// SPDX-License-Identifier: Apache-2.0
#include "disk/file.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace camem {
namespace {

std::mutex g_why_mutex;
std::string g_why_not_direct;

void note_why_not_direct(const std::string& why) {
  std::lock_guard<std::mutex> lock(g_why_mutex);
  g_why_not_direct = why;
}

template <class Call>
auto uninterrupted(const Call& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// Errors of a file system that has no files without a name.
bool needs_a_name(int error) { return error == EOPNOTSUPP || error == EISDIR || error == ENOENT; }

// -1 if it failed; see errno.
int open_without_name(const std::string& directory) {
  const int fd = uninterrupted([&] {
    return open(directory.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR);
  });
  if (fd >= 0 || !needs_a_name(errno)) return fd;
  std::string name;
  const int named = uninterrupted([&] {
    name = directory + "/.vllm-sleep-XXXXXX";  // also after a failure, which has filled it in
    return mkostemp(name.data(), O_CLOEXEC);
  });
  if (named < 0) return -1;
  // Twice: a file with a name would outlive the process.
  if (unlink(name.c_str()) == 0 || unlink(name.c_str()) == 0) return named;
  const int error = errno;
  close(named);
  errno = error;
  return -1;
}

std::string reason(int error) { return std::strerror(error); }

[[noreturn]] void throw_out_of_space(const std::string& directory, std::size_t needed,
                                     std::size_t free) {
  throw DiskError("the backup needs " + std::to_string(needed) + " bytes in " + directory +
                      " (backup_dir) and " + std::to_string(free) +
                      " are free; free disk space, choose another backup_dir, or use level 2, "
                      "which keeps no backup of the weights",
                  needed, free);
}

// For this user. Throws DiskError.
std::size_t free_disk_bytes(const std::string& directory) {
  struct statvfs status{};
  if (uninterrupted([&] { return statvfs(directory.c_str(), &status); }) != 0) {
    throw DiskError("the free space of " + directory +
                    " (backup_dir) cannot be read: " + reason(errno));
  }
  return static_cast<std::size_t>(status.f_bavail) * status.f_frsize;
}

}  // namespace

std::string why_not_direct() {
  std::lock_guard<std::mutex> lock(g_why_mutex);
  return g_why_not_direct;
}

DiskFile::DiskFile(const std::string& directory, std::size_t bytes) : directory_(directory) {
  const std::size_t free = free_disk_bytes(directory);
  if (bytes > free) throw_out_of_space(directory, bytes, free);
  fd_ = open_without_name(directory);
  if (fd_ < 0) {
    throw DiskError("no file can be created in " + directory + " (backup_dir): " + reason(errno) +
                    "; choose a directory in which this user may write");
  }
  // Not when it is opened: what refuses it then may have made the file already.
  note_why_not_direct("");
  const int flags = fcntl(fd_, F_GETFL);
  if (flags < 0 || fcntl(fd_, F_SETFL, flags | O_DIRECT) != 0) {
    direct_ = false;
    note_why_not_direct("the file system of " + directory + " refuses O_DIRECT: " + reason(errno));
  }
  try {
    preallocate(bytes);
  } catch (...) {
    close(fd_);
    throw;
  }
}

DiskFile::~DiskFile() { close(fd_); }

// Where space cannot be taken in advance, a write may find none, and the sleep rolls back.
void DiskFile::preallocate(std::size_t bytes) {
  const auto size = static_cast<off_t>(bytes);
  if (uninterrupted([&] { return fallocate(fd_, 0, 0, size); }) == 0) return;
  if (errno == EOPNOTSUPP || errno == ENOSYS) {
    if (uninterrupted([&] { return ftruncate(fd_, size); }) == 0) return;
  }
  const int error = errno;
  if (error == ENOSPC || error == EDQUOT) {
    // What it has taken is free again before the rest is counted.
    static_cast<void>(uninterrupted([&] { return ftruncate(fd_, 0); }));
    throw_out_of_space(directory_, bytes, error == EDQUOT ? 0 : free_disk_bytes(directory_));
  }
  fail("preallocated", error, bytes, 0);
}

void DiskFile::fail(const char* what, int error, std::size_t bytes, std::size_t offset) {
  const bool no_space = error == ENOSPC || error == EDQUOT;
  throw DiskError("the backup in " + directory_ +
                      " (backup_dir, a file without a name) could not "
                      "be " +
                      what + " at offset " + std::to_string(offset) + " for " +
                      std::to_string(bytes) +
                      " bytes: " + (error == 0 ? "the file is too short" : reason(error)) +
                      (no_space ? "; free disk space, or choose another backup_dir"
                                : "; look for errors of the disk in the kernel's log"),
                  no_space ? bytes : 0);
}

// Memory or sizes that do not suit the disk are refused by EINVAL, and memory of a driver whose
// pages the kernel cannot pin by EFAULT.
void DiskFile::use_page_cache(const std::string& why) {
  const int flags = fcntl(fd_, F_GETFL);
  if (flags >= 0) fcntl(fd_, F_SETFL, flags & ~O_DIRECT);
  direct_ = false;
  note_why_not_direct(why);
}

// Without an error where a file system does not know one of the calls.
void DiskFile::empty_page_cache(std::size_t bytes, std::size_t offset) {
  const auto start = static_cast<off_t>(offset), size = static_cast<off_t>(bytes);
  const int written = uninterrupted([&] {
    return sync_file_range(
        fd_, start, size,
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  });
  if (written != 0 && (errno == EIO || errno == ENOSPC || errno == EDQUOT)) {
    fail("written", errno, bytes, offset);
  }
  posix_fadvise(fd_, start, size, POSIX_FADV_DONTNEED);
}

template <class Call>
void DiskFile::transfer(const char* what, std::size_t bytes, std::size_t offset, const Call& call) {
  for (std::size_t done = 0; done < bytes;) {
    const bool direct = direct_;
    const ssize_t count = call(done);
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (count == 0) {
      fail(what, 0, bytes - done, offset + done);
    } else if (direct && (errno == EINVAL || errno == EFAULT)) {
      use_page_cache("a request with O_DIRECT failed in " + directory_ + ": " + reason(errno));
    } else if (errno != EINTR) {
      fail(what, errno, bytes - done, offset + done);
    }
  }
}

void DiskFile::write(const std::byte* data, std::size_t bytes, std::size_t offset) {
  transfer("written", bytes, offset, [&](std::size_t done) {
    return pwrite(fd_, data + done, bytes - done, static_cast<off_t>(offset + done));
  });
  if (!direct_) empty_page_cache(bytes, offset);
}

void DiskFile::read(std::byte* data, std::size_t bytes, std::size_t offset) {
  transfer("read", bytes, offset, [&](std::size_t done) {
    return pread(fd_, data + done, bytes - done, static_cast<off_t>(offset + done));
  });
  if (!direct_) empty_page_cache(bytes, offset);
}

void DiskFile::sync() {
  if (uninterrupted([&] { return fdatasync(fd_); }) != 0) fail("written", errno, 0, 0);
}

void DiskFile::forget(std::size_t bytes, std::size_t offset) noexcept {
  fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
            static_cast<off_t>(bytes));
}

}  // namespace camem
