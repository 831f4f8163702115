// SPDX-License-Identifier: Apache-2.0
//
// The kernel that programs of the simulated machine see. Preloaded into each of them, so it uses
// nothing but the C library and keeps no state.
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "settings.h"

// NPU_SIM_KERNEL as it is, or with the third number that every release has.
extern "C" __attribute__((visibility("default"))) int uname(utsname* name) {
  if (syscall(SYS_uname, name) != 0) return -1;
  const char* kernel = std::getenv("NPU_SIM_KERNEL");
  if (kernel == nullptr || *kernel == '\0') kernel = sim::kKernel;
  const char* dot = std::strchr(kernel, '.');
  bool has_patch = dot != nullptr && std::strchr(dot + 1, '.') != nullptr;
  std::snprintf(name->release, sizeof(name->release), has_patch ? "%s" : "%s.0", kernel);
  return 0;
}
