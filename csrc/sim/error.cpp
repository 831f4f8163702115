// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace sim {
namespace {

struct Recent {
  std::string message;
  std::string handed_out;
  aclError code = ACL_SUCCESS;
};

Recent& recent() {
  static thread_local Recent recent;
  return recent;
}

std::string formatted(const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

}  // namespace

aclError fail(aclError code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  recent().message = formatted(format, arguments) + " [" + std::to_string(code) + "]";
  va_end(arguments);
  recent().code = code;
  return code;
}

void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = formatted(format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "npu-sim: device fault: %s\n", text.c_str());
  std::fflush(stderr);
  std::abort();
}

const char* take_recent_message() {
  if (recent().message.empty()) return nullptr;
  recent().handed_out.swap(recent().message);
  recent().message.clear();
  return recent().handed_out.c_str();
}

aclError last_error(bool clear) {
  aclError code = recent().code;
  if (clear) recent().code = ACL_SUCCESS;
  return code;
}

}  // namespace sim
