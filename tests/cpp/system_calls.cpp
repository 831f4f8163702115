// SPDX-License-Identifier: Apache-2.0
#include "system_calls.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <map>
#include <mutex>
#include <optional>

namespace system_calls {

struct Rule {
  std::string call;
  std::size_t nth;
  Fault fault;
  int error;
  bool lasting;
  std::size_t seen = 0, hits = 0;
};

namespace {

std::mutex mutex;
std::map<std::string, std::size_t> counts;
std::vector<std::shared_ptr<Rule>> rules;

// What this call is to do, if anything.
std::optional<Rule> rule_of(const char* call) {
  std::lock_guard<std::mutex> lock(mutex);
  ++counts[call];
  for (const auto& rule : rules) {
    if (rule->call != call) continue;
    ++rule->seen;
    if (rule->seen != rule->nth && !(rule->lasting && rule->seen > rule->nth)) continue;
    ++rule->hits;
    return *rule;
  }
  return {};
}

template <class Function>
Function libc(const char* name, Function) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

// -1 if the call has to fail.
template <class Call>
int unless_it_fails(const char* name, const Call& call) {
  const auto wanted = rule_of(name);
  if (!wanted) return call();
  errno = wanted->error;
  return -1;
}

}  // namespace

Failing::Failing(const std::string& call, std::size_t nth, Fault fault, int error, bool lasting)
    : rule_(std::make_shared<Rule>(Rule{call, nth, fault, error, lasting})) {
  std::lock_guard<std::mutex> lock(mutex);
  rules.push_back(rule_);
}

Failing::~Failing() {
  std::lock_guard<std::mutex> lock(mutex);
  rules.erase(std::find(rules.begin(), rules.end(), rule_));
}

std::size_t Failing::hits() const {
  std::lock_guard<std::mutex> lock(mutex);
  return rule_->hits;
}

Counting::Counting() {
  std::lock_guard<std::mutex> lock(mutex);
  counts.clear();
}

std::size_t Counting::count(const std::string& call) const {
  std::lock_guard<std::mutex> lock(mutex);
  return counts[call];
}

std::vector<std::string> Counting::names() const {
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<std::string> names;
  for (const auto& [name, count] : counts) {
    if (count > 0) names.push_back(name);
  }
  return names;
}

}  // namespace system_calls

using namespace system_calls;

extern "C" {

int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  static const auto real = libc("open", &open);
  if ((flags & O_TMPFILE) != O_TMPFILE) return real(path, flags, mode);
  return unless_it_fails("open", [&] { return real(path, flags, mode); });
}

int mkostemp(char* name, int flags) {
  static const auto real = libc("mkostemp", &mkostemp);
  return unless_it_fails("mkostemp", [&] { return real(name, flags); });
}

int unlink(const char* path) noexcept {
  static const auto real = libc("unlink", &unlink);
  return unless_it_fails("unlink", [&] { return real(path); });
}

int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  static const auto real = libc("fcntl", &fcntl);
  if (command != F_SETFL) return real(fd, command, argument);
  return unless_it_fails("fcntl", [&] { return real(fd, command, argument); });
}

int fallocate(int fd, int mode, off_t offset, off_t bytes) {
  static const auto real = libc("fallocate", &fallocate);
  return unless_it_fails("fallocate", [&] { return real(fd, mode, offset, bytes); });
}

int ftruncate(int fd, off_t bytes) noexcept {
  static const auto real = libc("ftruncate", &ftruncate);
  return unless_it_fails("ftruncate", [&] { return real(fd, bytes); });
}

int fdatasync(int fd) {
  static const auto real = libc("fdatasync", &fdatasync);
  return unless_it_fails("fdatasync", [&] { return real(fd); });
}

int sync_file_range(int fd, off_t offset, off_t bytes, unsigned flags) {
  static const auto real = libc("sync_file_range", &sync_file_range);
  return unless_it_fails("sync_file_range", [&] { return real(fd, offset, bytes, flags); });
}

int statvfs(const char* path, struct statvfs* status) noexcept {
  static const auto real = libc("statvfs", &statvfs);
  const auto wanted = rule_of("statvfs");
  if (wanted && wanted->fault == Fault::kError) {
    errno = wanted->error;
    return -1;
  }
  const int result = real(path, status);
  if (wanted && result == 0) status->f_bavail = 1;
  return result;
}

ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  static const auto real = libc("pwrite", &pwrite);
  const auto wanted = rule_of("pwrite");
  if (!wanted) return real(fd, data, bytes, offset);
  if (wanted->fault == Fault::kShort) return real(fd, data, bytes / 2, offset);
  if (wanted->fault == Fault::kEmpty) return 0;
  if (wanted->fault == Fault::kTorn) {
    auto* changed = const_cast<unsigned char*>(static_cast<const unsigned char*>(data));
    changed[bytes / 2] ^= 1;
    const ssize_t result = real(fd, data, bytes, offset);
    changed[bytes / 2] ^= 1;
    return result;
  }
  errno = wanted->error;
  return -1;
}

ssize_t pread(int fd, void* data, size_t bytes, off_t offset) {
  static const auto real = libc("pread", &pread);
  const auto wanted = rule_of("pread");
  if (!wanted) return real(fd, data, bytes, offset);
  if (wanted->fault == Fault::kShort) return real(fd, data, bytes / 2, offset);
  if (wanted->fault == Fault::kEmpty) return 0;
  if (wanted->fault == Fault::kTorn) {
    const ssize_t result = real(fd, data, bytes, offset);
    static_cast<unsigned char*>(data)[bytes / 2] ^= 1;
    return result;
  }
  errno = wanted->error;
  return -1;
}

}  // extern "C"
