// SPDX-License-Identifier: Apache-2.0
//
// How the ranks of a communicator find and connect to each other: TCP, one listening socket per
// process.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace sim::hccl {

using Deadline = std::chrono::steady_clock::time_point;

// An owned file descriptor.
class Socket {
 public:
  explicit Socket(int file = -1) : file_(file) {}
  ~Socket();
  Socket(Socket&& other) noexcept : file_(other.file_) { other.file_ = -1; }
  Socket& operator=(Socket&& other) noexcept;
  int file() const { return file_; }

 private:
  int file_;
};

struct Address {
  uint32_t ip;  // both in network order
  uint16_t port;
  uint16_t unused;

  bool operator==(const Address& other) const { return ip == other.ip && port == other.port; }
};

enum class Purpose : uint32_t { kJoin, kMesh };

// The first bytes of every connection.
struct Hello {
  uint64_t magic;
  uint64_t key;  // of the communicator
  Purpose purpose;
  uint32_t rank;
  uint32_t ranks;
  Address address;  // of the rank that connects
  uint64_t device;  // the key of its device, different for each rank
};

// The address where this process listens; opened at the first call. Port 0 if that failed.
Address own_address();

// Connects and says hello. A negative file if nothing listens there before the deadline.
Socket connect_to(const Address& address, const Hello& hello, Deadline deadline);

struct Arrival {
  Hello hello;
  Socket socket;
};

// Waits for the next connection for this communicator, only from this rank unless `any_rank`. Null
// if none comes before the deadline.
constexpr uint32_t any_rank = UINT32_MAX;
std::unique_ptr<Arrival> take_arrival(uint64_t key, Purpose purpose, uint32_t rank,
                                      Deadline deadline);

// Blocks until all bytes are moved. False if the other side is gone, or after the deadline.
bool send_all(int file, const void* data, size_t bytes, Deadline deadline);
bool receive_all(int file, void* data, size_t bytes, Deadline deadline);

bool is_gone(int file);  // the other side has closed the connection
int poll_timeout(Deadline deadline);

}  // namespace sim::hccl
