// SPDX-License-Identifier: Apache-2.0
#include "state/machine.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "settings.h"

namespace sim::machine {
namespace {

constexpr int kSlots = 256;
constexpr off_t kMutexByte = kSlots;

using Amounts = std::atomic<size_t>[kMaxDevices];

struct Slot {
  Amounts bytes;
  Amounts streams;
};

struct Link {
  std::atomic<int64_t> free_at_ns[2];  // per direction, CLOCK_MONOTONIC
};

struct Shared {
  Slot slots[kSlots];
  Link links[kMaxDevices];
};

// A slot belongs to the process that holds the record lock on the slot's byte of the state file.
// The kernel releases record locks when a process dies, before it can be reaped, so a slot without
// a lock does not count. The file is opened once and never closed, because closing any descriptor
// of it would release the lock.
class State {
 public:
  State() {
    mkdir(settings().state_directory.c_str(), 0700);
    std::string path = settings().state_directory + "/state-2";
    file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file_ < 0 || ftruncate(file_, sizeof(Shared)) != 0) die(path);
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED) die(path);
    shared_ = static_cast<Shared*>(memory);
    Locked locked(*this);
    for (slot_ = 0; slot_ < kSlots; ++slot_) {
      if (lock(F_SETLK, F_WRLCK, slot_)) break;
    }
    if (slot_ == kSlots) die(path);
    for (auto& bytes : mine().bytes) bytes = 0;
    for (auto& streams : mine().streams) streams = 0;
  }

  // Uses a record lock between processes, and a mutex between threads of this one.
  class Locked {
   public:
    explicit Locked(State& state) : state_(state), threads_(state.threads_) {
      state_.lock(F_SETLKW, F_WRLCK, kMutexByte);
    }
    ~Locked() { state_.lock(F_SETLK, F_UNLCK, kMutexByte); }

   private:
    State& state_;
    std::lock_guard<std::mutex> threads_;
  };

  Slot& mine() { return shared_->slots[slot_]; }
  Link& link(int device) { return shared_->links[device]; }

  size_t taken(Amounts Slot::* what, int device) {
    size_t sum = 0;
    for (int slot = 0; slot < kSlots; ++slot) {
      auto& taken = (shared_->slots[slot].*what)[device];
      if (taken == 0) continue;
      if (slot == slot_ || is_locked(slot)) {
        sum += taken;
      } else {
        taken = 0;
      }
    }
    return sum;
  }

  bool take(Amounts Slot::* what, int device, size_t amount, size_t capacity) {
    if (amount > capacity || taken(what, device) + amount > capacity) return false;
    (mine().*what)[device] += amount;
    return true;
  }

 private:
  bool lock(int command, short type, off_t byte) {
    struct flock record = {};
    record.l_type = type;
    record.l_whence = SEEK_SET;
    record.l_start = byte;
    record.l_len = 1;
    int result;
    do {
      result = fcntl(file_, command, &record);
    } while (result != 0 && command == F_SETLKW);
    return result == 0;
  }

  bool is_locked(int slot) {
    struct flock record = {};
    record.l_type = F_WRLCK;
    record.l_whence = SEEK_SET;
    record.l_start = slot;
    record.l_len = 1;
    return fcntl(file_, F_GETLK, &record) == 0 && record.l_type != F_UNLCK;
  }

  [[noreturn]] static void die(const std::string& path) {
    std::fprintf(stderr, "npu-sim: cannot use the state of the simulated machine, %s\n",
                 path.c_str());
    std::abort();
  }

  std::mutex threads_;
  int file_ = -1;
  int slot_ = 0;
  Shared* shared_ = nullptr;
};

State& state() {
  static State* once = new State;
  return *once;
}

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

}  // namespace

bool take(int device, size_t bytes) {
  State::Locked locked(state());
  return state().take(&Slot::bytes, device, bytes, settings().hbm_bytes);
}

void give(int device, size_t bytes) {
  State::Locked locked(state());
  state().mine().bytes[device] -= bytes;
}

size_t taken(int device) {
  State::Locked locked(state());
  return state().taken(&Slot::bytes, device);
}

size_t taken_by_this_process(int device) { return state().mine().bytes[device]; }

bool take_stream(int device) {
  State::Locked locked(state());
  return state().take(&Slot::streams, device, 1, settings().streams);
}

void give_stream(int device) {
  State::Locked locked(state());
  --state().mine().streams[device];
}

size_t streams_left(int device) {
  State::Locked locked(state());
  size_t taken = state().taken(&Slot::streams, device);
  return taken < settings().streams ? settings().streams - taken : 0;
}

void occupy_link(int device, device::Direction direction, size_t bytes) {
  double rate = settings().link_bytes_per_ns;
  if (rate <= 0 || direction == device::Direction::kDeviceToDevice) return;
  auto& free_at =
      state().link(device).free_at_ns[direction == device::Direction::kHostToDevice ? 0 : 1];
  int64_t duration = static_cast<int64_t>(static_cast<double>(bytes) / rate);
  int64_t seen = free_at;
  int64_t until;
  do {
    until = std::max(seen, now_ns()) + duration;
  } while (!free_at.compare_exchange_weak(seen, until));
  timespec end = {until / 1000000000, until % 1000000000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, nullptr) != 0) {
  }
}

}  // namespace sim::machine
