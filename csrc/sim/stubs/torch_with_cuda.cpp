// SPDX-License-Identifier: Apache-2.0
// torch_npu 2.14 beside torch's CUDA build, which PyPI has for x86-64: both register some of the
// allocator's options with torch under the same name, which takes the second one for an error and
// ends the process. Loaded for all to see (sitecustomize.py), this gives torch_npu's the place. On
// real machines torch's CPU build is the remedy.

#include <dlfcn.h>

#include <string>
#include <string_view>
#include <unordered_set>

namespace c10::CachingAllocator {

using Keys = std::unordered_set<std::string>;

class AcceleratorAllocatorConfig {
 public:
  __attribute__((visibility("default"))) static Keys& getMutableKeys();
};

Keys& AcceleratorAllocatorConfig::getMutableKeys() {
  static const auto of_torch = reinterpret_cast<Keys& (*)()>(
      dlsym(dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD),
            "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev"));
  Keys& keys = of_torch();
  Dl_info caller{};
  dladdr(__builtin_return_address(0), &caller);
  const std::string_view library = caller.dli_fname != nullptr ? caller.dli_fname : "";
  if (library.find("libtorch_npu.so") != library.npos) {
    for (const char* both : {"pinned_reserve_segment_size_mb", "per_process_memory_fraction"}) {
      keys.erase(both);
    }
  }
  return keys;
}

}  // namespace c10::CachingAllocator
