// SPDX-License-Identifier: Apache-2.0
//
// Just enough of a test framework. TEST(name) { CHECK(...); } registers itself, as does
// TEST_OF_NEWER_KERNEL, for a host whose kernel keeps registered memory in place; main.cpp runs
// all.
#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Case {
  std::string name;
  std::function<void()> run;
  bool of_newer_kernel;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline bool add(std::string name, std::function<void()> run, bool of_newer_kernel = false) {
  cases().push_back({std::move(name), std::move(run), of_newer_kernel});
  return true;
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename Left, typename Right>
void equal(const Left& left, const Right& right, const char* what, const char* file, int line) {
  if (left == right) return;
  std::ostringstream text;
  text << what << ": " << left << " is not " << right;
  fail(file, line, text.str());
}

}  // namespace check

#define TEST_OF(name, of_newer_kernel)                                             \
  static void name();                                                              \
  static const bool name##_added = ::check::add(#name, (name), (of_newer_kernel)); \
  static void name()

#define TEST(name) TEST_OF(name, false)
#define TEST_OF_NEWER_KERNEL(name) TEST_OF(name, true)

#define CHECK(condition) \
  ((condition) ? void() : ::check::fail(__FILE__, __LINE__, "not so: " #condition))

#define CHECK_EQ(left, right) \
  ::check::equal((left), (right), #left " == " #right, __FILE__, __LINE__)

// The statement throws this type.
#define CHECK_THROWS(type, statement)                                               \
  do {                                                                              \
    bool thrown = false;                                                            \
    try {                                                                           \
      statement;                                                                    \
    } catch (const type&) {                                                         \
      thrown = true;                                                                \
    }                                                                               \
    if (!thrown) ::check::fail(__FILE__, __LINE__, #statement " throws no " #type); \
  } while (false)
