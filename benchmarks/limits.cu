// SPDX-License-Identifier: Apache-2.0
//
// The limits of the driver and the link of a CUDA machine, without this project's code: lower bounds
// for the times of allocator.py and overlap.py.
//
//     nvcc -O2 -std=c++17 benchmarks/limits.cu -o build/limits -lcuda && build/limits
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#define CHECK(call)                                                        \
  do {                                                                     \
    if (const int error = static_cast<int>(call)) {                        \
      std::printf("%s failed with %d, line %d\n", #call, error, __LINE__); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace {

constexpr size_t kMiB = size_t{1} << 20, kGiB = size_t{1} << 30;
constexpr size_t kWeights = 14 * kGiB, kCache = 28 * kGiB;

using Meet = std::function<void()>;
using Part = std::function<void(const Meet& meet)>;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double device_mib() {
  size_t free = 0, total = 0;
  CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<double>(total - free) / kMiB;
}

struct Block {
  CUdeviceptr address;
  size_t bytes;
  CUmemGenericAllocationHandle handle;

  void map() {
    CUmemAllocationProp property = {};
    property.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    property.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CHECK(cuMemCreate(&handle, bytes, &property, 0));
    CHECK(cuMemMap(address, bytes, 0, handle, 0));
    CUmemAccessDesc access = {property.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CHECK(cuMemSetAccess(address, bytes, &access, 1));
  }
  void unmap() {
    CHECK(cuMemUnmap(address, bytes));
    CHECK(cuMemRelease(handle));
  }
};

std::vector<Block> reserve(size_t total, size_t chunk) {
  CUdeviceptr base = 0;
  CHECK(cuMemAddressReserve(&base, total, 0, 0, 0));
  std::vector<Block> blocks;
  for (size_t offset = 0; offset < total; offset += chunk)
    blocks.push_back({base + offset, chunk, 0});
  return blocks;
}

double in_threads(std::vector<Block>& blocks, unsigned threads, void (Block::*step)()) {
  const double start = now();
  std::atomic<size_t> next{0};
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < threads; ++i) {
    workers.emplace_back([&] {
      CHECK(cudaSetDevice(0));
      for (size_t block; (block = next++) < blocks.size();) (blocks[block].*step)();
    });
  }
  for (std::thread& worker : workers) worker.join();
  return (now() - start) * 1e3;
}

// The driver keeps 8 bytes of page table on the device for every 4 KiB of pinned host memory.
void pinned_memory() {
  CHECK(cudaDeviceSynchronize());
  const double before = device_mib();
  void* host = nullptr;
  CHECK(cudaHostAlloc(&host, kWeights, cudaHostAllocPortable));
  std::printf("14 GiB of pinned host memory take %.2f MiB of the device\n", device_mib() - before);
  CHECK(cudaFreeHost(host));
}

void giving_back() {
  for (const auto& [name, total, chunk] :
       {std::tuple{"14 GiB in 64 MiB handles", kWeights, 64 * kMiB},
        std::tuple{"14 GiB in 256 MiB handles", kWeights, 256 * kMiB},
        std::tuple{"28 GiB in 1 GiB handles", kCache, kGiB}}) {
    for (const unsigned threads : {1u, 2u, 4u}) {
      std::vector<Block> blocks = reserve(total, chunk);
      std::vector<double> mapped, unmapped;
      for (int i = 0; i < 5; ++i) {
        usleep(300000);
        mapped.push_back(in_threads(blocks, threads, &Block::map));
        CHECK(cuMemsetD8(blocks[0].address, 1, total));
        CHECK(cudaDeviceSynchronize());
        unmapped.push_back(in_threads(blocks, threads, &Block::unmap));
      }
      std::sort(mapped.begin(), mapped.end());
      std::sort(unmapped.begin(), unmapped.end());
      std::printf("%s, %u threads: mapping %.1f ms, giving back %.1f ms\n", name, threads,
                  mapped[2], unmapped[2]);
      CHECK(cuMemAddressFree(blocks[0].address, total));
    }
  }
}

void copy_14_gib(cudaMemcpyKind kind, const Meet& start, const char* name) {
  void *host = nullptr, *device = nullptr;
  CHECK(cudaHostAlloc(&host, kGiB, cudaHostAllocPortable));
  CHECK(cudaMalloc(&device, kGiB));
  start();
  const double begin = now();
  for (size_t i = 0; i < kWeights / (64 * kMiB); ++i) {
    char* at[] = {static_cast<char*>(device) + i % 16 * 64 * kMiB,
                  static_cast<char*>(host) + i % 16 * 64 * kMiB};
    const bool up = kind == cudaMemcpyHostToDevice;
    CHECK(cudaMemcpyAsync(at[up ? 0 : 1], at[up ? 1 : 0], 64 * kMiB, kind, nullptr));
  }
  CHECK(cudaDeviceSynchronize());
  std::printf("%s: 14 GiB in %.0f ms\n", name, (now() - begin) * 1e3);
}

std::vector<Block> filled(size_t total, size_t chunk) {
  std::vector<Block> blocks = reserve(total, chunk);
  in_threads(blocks, 1, &Block::map);
  CHECK(cuMemsetD8(blocks[0].address, 1, total));
  CHECK(cudaDeviceSynchronize());
  return blocks;
}

// What a sleep frees: the cache at once, and optionally the weights while they are copied.
void give_back(const Meet& meet, bool weights_too) {
  std::vector<Block> cache = filled(kCache, kGiB);
  std::vector<Block> weights = weights_too ? filled(kWeights, 64 * kMiB) : std::vector<Block>{};
  meet();
  std::printf("giving 28 GiB back: %.0f ms\n", in_threads(cache, 1, &Block::unmap));
  const double start = now();
  for (size_t i = 0; i < weights.size(); ++i) {
    while (now() - start < 0.28 * static_cast<double>(i) / static_cast<double>(weights.size())) {
      usleep(100);
    }
    weights[i].unmap();
  }
  usleep(500000);
}

// Each part runs in a separate process, like engines; a part calls meet() when it is ready.
void in_processes(const std::vector<Part>& parts) {
  auto* ready = static_cast<std::atomic<size_t>*>(
      mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::fflush(stdout);
  for (const Part& part : parts) {
    if (fork() != 0) continue;
    CHECK(cudaSetDevice(0));
    CHECK(cudaFree(nullptr));
    part([&] {
      for (++*ready; *ready < parts.size();) usleep(50);
    });
    std::fflush(stdout);
    _exit(0);
  }
  while (wait(nullptr) > 0) {
  }
}

}  // namespace

int main() {
  in_processes({[](const Meet&) { pinned_memory(); }});
  in_processes({[](const Meet&) { giving_back(); }});
  const Part down = [](const Meet& meet) {
    copy_14_gib(cudaMemcpyDeviceToHost, meet, "device to host");
  };
  const Part up = [](const Meet& meet) {
    copy_14_gib(cudaMemcpyHostToDevice, meet, "host to device");
  };
  in_processes({down});
  in_processes({up});
  std::printf("both at once:\n");
  in_processes({down, up});
  const Part give_cache = [](const Meet& meet) { give_back(meet, false); };
  const Part give_all = [](const Meet& meet) { give_back(meet, true); };
  std::printf("one direction, and another process gives 28 GiB back:\n");
  in_processes({up, give_cache});
  in_processes({down, give_cache});
  std::printf("both directions, and another process gives 28 GiB back:\n");
  in_processes({down, up, give_cache});
  std::printf(
      "both directions, and another process gives 28 GiB back and then 14 GiB by and by:\n");
  in_processes({down, up, give_all});
  for (const size_t chunk : {64 * kMiB, 256 * kMiB}) {
    std::printf("mapping 14 GiB in %zu MiB handles while another process copies:\n", chunk / kMiB);
    in_processes({down, [&](const Meet& meet) {
                    std::vector<Block> blocks = reserve(kWeights, chunk);
                    meet();
                    usleep(10000);
                    const double milliseconds = in_threads(blocks, 1, &Block::map);
                    std::printf("%zu calls in %.0f ms\n", blocks.size(), milliseconds);
                  }});
  }
}
