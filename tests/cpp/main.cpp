// SPDX-License-Identifier: Apache-2.0
//
// Runs every case of the kernel that NPU_SIM_KERNEL names, or those whose name contains the first
// argument. After each one the process holds exactly what it held before: what a case leaks, fails
// that case.
#include <acl/acl.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "check.h"
#include "device.h"
#include "pool/pool.h"

namespace {

void run(const check::Case& test) {
  aclrtSetDevice(0);
  const device::Held before = device::held();
  test.run();
  CHECK_EQ(device::held(), before);
  CHECK_EQ(camem::Pool::instance().allocations().size(), 0u);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  const char* kernel = std::getenv("NPU_SIM_KERNEL");
  const bool is_newer_kernel = kernel != nullptr && std::string(kernel) == "6.1";
  aclInit(nullptr);
  int found = 0, passed = 0, failed = 0;
  for (const check::Case& test : check::cases()) {
    if (test.name.find(wanted) == std::string::npos) continue;
    ++found;
    if (test.of_newer_kernel != is_newer_kernel) continue;
    try {
      run(test);
      ++passed;
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s\n  %s\n", test.name.c_str(), error.what());
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && found > 0 ? 0 : 1;
}
