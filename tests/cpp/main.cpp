// SPDX-License-Identifier: Apache-2.0
//
// Runs every case of the kernel that NPU_SIM_KERNEL names, or those whose name contains the first
// argument, in as many processes as there are processors, each on a simulated machine of its own.
// After each case its process holds exactly what it held before; what a case leaks, fails it.
#include <acl/acl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "device.h"
#include "pool/pool.h"

namespace {

struct Counts {
  std::atomic<unsigned> taken{0}, passed{0}, failed{0};
};

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

std::vector<const check::Case*> chosen(const std::string& wanted) {
  const bool is_newer_kernel = setting("NPU_SIM_KERNEL") == "6.1";
  std::vector<const check::Case*> cases;
  bool found = false;
  for (const check::Case& test : check::cases()) {
    if (test.name.find(wanted) == std::string::npos) continue;
    found = true;
    if (test.of_newer_kernel == is_newer_kernel) cases.push_back(&test);
  }
  if (found) return cases;
  std::printf("no case is named %s\n", wanted.c_str());
  std::exit(1);
}

void run(const check::Case& test) {
  aclrtSetDevice(0);
  const device::Held before = device::held();
  test.run();
  CHECK_EQ(device::held(), before);
  CHECK_EQ(camem::Pool::instance().allocations().size(), 0u);
}

// Takes cases until none is left.
void work(const std::vector<const check::Case*>& cases, Counts& counts) {
  aclInit(nullptr);
  for (unsigned next; (next = counts.taken++) < cases.size();) {
    try {
      run(*cases[next]);
      ++counts.passed;
    } catch (const std::exception& error) {
      ++counts.failed;
      std::printf("FAILED %s\n  %s\n", cases[next]->name.c_str(), error.what());
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const auto cases = chosen(count > 1 ? arguments[1] : "");
  void* shared =
      mmap(nullptr, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
  Counts& counts = *new (shared) Counts;
  const unsigned workers = std::max(1u, std::thread::hardware_concurrency());
  for (unsigned worker = 0; worker < workers; ++worker) {
    const pid_t child = fork();
    if (child < 0) return 1;
    if (child > 0) continue;
    const std::string machine = setting("NPU_SIM_MACHINE") + "-" + std::to_string(worker);
    setenv("NPU_SIM_MACHINE", machine.c_str(), true);
    work(cases, counts);
    return 0;
  }
  bool is_clean = true;
  for (int status; wait(&status) > 0;) {
    if (status == 0) continue;
    is_clean = false;
    std::printf("A process ended with status %#x: a crash, or what a sanitizer found\n", status);
  }
  std::printf("%u of %zu passed, %u failed\n", counts.passed.load(), cases.size(),
              counts.failed.load());
  return is_clean && counts.passed == cases.size() ? 0 : 1;
}
