// SPDX-License-Identifier: Apache-2.0
//
// Device memory made of host memory.
//
// Physical memory is a private mapping of a small file full of poison: a page costs nothing until
// it is written, and reads as poison until then. Mapping and unmapping move the pages between the
// reservation and a hidden place, so content follows the handle. Shared memory is an ordinary memfd
// instead, which is filled when the memory becomes shared.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "error.h"
#include "settings.h"
#include "state/machine.h"

namespace sim::device {

struct Physical {
  size_t bytes;
  char* place = nullptr;  // where its pages are mapped now: in a reservation, or hidden
  bool hidden = false;
  int shared_file = -1;
};

namespace {

constexpr size_t kPiece = 4 * kMiB;  // size of the poison file
constexpr size_t kParallelFrom = 32 * kMiB;

void* map_inaccessible(void* at, size_t bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at != nullptr ? MAP_FIXED : 0);
  return mmap(at, bytes, PROT_NONE, flags, -1, 0);
}

void fill_with_poison(char* memory, size_t bytes) {
  std::fill_n(reinterpret_cast<uint16_t*>(memory), bytes / sizeof(kPoison), kPoison);
}

int make_poison_file() {
  int file = memfd_create("npu-sim-poison", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, kPiece) != 0) fault("no memory for the poison pages");
  void* memory = mmap(nullptr, kPiece, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) fault("no memory for the poison pages");
  fill_with_poison(static_cast<char*>(memory), kPiece);
  munmap(memory, kPiece);
  return file;
}

template <typename Function>  // (offset, bytes) of every piece; false stops
bool for_each_piece(size_t bytes, Function function) {
  for (size_t offset = 0; offset < bytes; offset += kPiece) {
    if (!function(offset, std::min(kPiece, bytes - offset))) return false;
  }
  return true;
}

bool map_poison(char* address, size_t bytes) {
  static const int file = make_poison_file();
  return for_each_piece(bytes, [&](size_t offset, size_t piece) {
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    return mmap(address + offset, piece, PROT_READ | PROT_WRITE, flags, file, 0) != MAP_FAILED;
  });
}

// The old range stays mapped all the time, so that the kernel cannot give it to another thread.
bool move_pages(char* to, char* from, size_t bytes) {
  bool moved = for_each_piece(bytes, [&](size_t offset, size_t piece) {
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
    return mremap(from + offset, piece, piece, flags, to + offset) != MAP_FAILED;
  });
  return moved && map_inaccessible(from, bytes) != MAP_FAILED;
}

template <typename Function>  // (offset, bytes) of every part, on all cores where it pays
void in_parallel(size_t bytes, Function function) {
  size_t threads = std::max(1u, std::thread::hardware_concurrency());
  if (bytes < kParallelFrom) threads = 1;
  size_t part = (bytes / threads + kMiB) & ~(kMiB - 1);
  std::vector<std::thread> others;
  for (size_t offset = part; offset < bytes; offset += part) {
    others.emplace_back(function, offset, std::min(part, bytes - offset));
  }
  function(0, std::min(part, bytes));
  for (std::thread& other : others) other.join();
}

std::string descriptor_path(uint64_t key) {
  return "/proc/" + std::to_string(key >> 32) + "/fd/" + std::to_string(key & 0xffffffff);
}

}  // namespace

void* reserve(size_t bytes, size_t alignment) {
  auto* raw = static_cast<char*>(map_inaccessible(nullptr, bytes + alignment));
  if (raw == MAP_FAILED) return nullptr;
  size_t before = (alignment - reinterpret_cast<uintptr_t>(raw) % alignment) % alignment;
  if (before > 0) munmap(raw, before);
  munmap(raw + before + bytes, alignment - before);
  return raw + before;
}

void release(void* address, size_t bytes) { munmap(address, bytes); }

Physical* create_physical(int, size_t bytes) {
  auto* memory = new Physical;
  memory->bytes = bytes;
  return memory;
}

void destroy_physical(Physical* memory) {
  if (memory->hidden) munmap(memory->place, memory->bytes);
  if (memory->shared_file >= 0) close(memory->shared_file);
  delete memory;
}

bool map(void* address, Physical* memory) {
  auto* to = static_cast<char*>(address);
  bool mapped;
  if (memory->shared_file >= 0) {
    mapped = mmap(to, memory->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                  memory->shared_file, 0) != MAP_FAILED;
  } else if (!memory->hidden) {
    mapped = map_poison(to, memory->bytes);
  } else {
    mapped = move_pages(to, memory->place, memory->bytes);
    if (mapped) munmap(memory->place, memory->bytes);
  }
  if (!mapped) return map_inaccessible(to, memory->bytes), false;
  memory->place = to;
  memory->hidden = false;
  return true;
}

void unmap(void* address, Physical* memory) {
  auto* from = static_cast<char*>(address);
  memory->place = nullptr;
  if (memory->shared_file >= 0) {
    map_inaccessible(from, memory->bytes);
    return;
  }
  auto* hidden = static_cast<char*>(reserve(memory->bytes, 2 * kMiB));
  if (hidden == nullptr || !move_pages(hidden, from, memory->bytes)) {
    fault("the operating system cannot move %zu bytes of device memory", memory->bytes);
  }
  memory->place = hidden;
  memory->hidden = true;
}

bool share(Physical* memory, uint64_t* key) {
  if (memory->shared_file < 0) {
    int file = memfd_create("npu-sim-shared", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, memory->bytes) != 0) return false;
    void* content = mmap(nullptr, memory->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (content == MAP_FAILED) return close(file), false;
    if (memory->place != nullptr) {
      std::memcpy(content, memory->place, memory->bytes);
    } else {
      fill_with_poison(static_cast<char*>(content), memory->bytes);
    }
    munmap(content, memory->bytes);
    if (memory->hidden) {
      munmap(memory->place, memory->bytes);
      memory->place = nullptr;
      memory->hidden = false;
    }
    memory->shared_file = file;
    if (memory->place != nullptr && !map(memory->place, memory)) return false;
  }
  *key = static_cast<uint64_t>(getpid()) << 32 | static_cast<uint64_t>(memory->shared_file);
  return true;
}

Physical* open_shared(int, uint64_t key, size_t* bytes) {
  int file = open(descriptor_path(key).c_str(), O_RDWR | O_CLOEXEC);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return nullptr;
  auto* memory = new Physical;
  memory->bytes = *bytes = static_cast<size_t>(status.st_size);
  memory->shared_file = file;
  return memory;
}

// Page-locked memory is allocated at once with arbitrary content, and a forked child does not
// inherit it.
void* allocate_host(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, bytes, MADV_HUGEPAGE);
  madvise(memory, bytes, MADV_DONTFORK);
  fill_with_poison(static_cast<char*>(memory), bytes);
  return memory;
}

void free_host(void* address, size_t bytes) { munmap(address, bytes); }

const bool kRegisteringPins = false;

bool register_host(void*, size_t) { return true; }
void unregister_host(void*) {}

bool copy(int device, void* to, const void* from, size_t bytes, Direction direction) {
  bool throttled = settings().link_bytes_per_ns > 0 && direction != Direction::kDeviceToDevice;
  size_t step = throttled ? 4 * kMiB : bytes;
  for (size_t done = 0; done < bytes; done += step) {
    size_t part = std::min(step, bytes - done);
    auto* target = static_cast<char*>(to) + done;
    auto* source = static_cast<const char*>(from) + done;
    in_parallel(part, [=](size_t offset, size_t count) {
      std::memmove(target + offset, source + offset, count);
    });
    machine::occupy_link(device, direction, part);
  }
  return true;
}

bool fill(int, void* address, int value, size_t bytes) {
  auto* memory = static_cast<char*>(address);
  in_parallel(bytes,
              [=](size_t offset, size_t count) { std::memset(memory + offset, value, count); });
  return true;
}

}  // namespace sim::device
