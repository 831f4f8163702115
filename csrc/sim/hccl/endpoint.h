// SPDX-License-Identifier: Apache-2.0
//
// How the ranks of a communicator find and reach each other: TCP, one listening socket a process.
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
  uint64_t device;  // that it uses, unlike that of every other rank
};

// Where this process listens; opened at the first call. Port 0: it could not be opened.
Address own_address();

// Connects and says hello. Negative file: nobody listens there, or not before the deadline.
Socket connect_to(const Address& address, const Hello& hello, Deadline deadline);

struct Arrival {
  Hello hello;
  Socket socket;
};

// Waits for the next connection for this communicator; of this rank alone unless `any_rank`.
// Null: not before the deadline.
constexpr uint32_t any_rank = UINT32_MAX;
std::unique_ptr<Arrival> take_arrival(uint64_t key, Purpose purpose, uint32_t rank,
                                      Deadline deadline);

// Blocking, whole. False: the other side is gone, or not before the deadline.
bool send_all(int file, const void* data, size_t bytes, Deadline deadline);
bool receive_all(int file, void* data, size_t bytes, Deadline deadline);

bool is_gone(int file);  // the other side has closed the connection
int poll_timeout(Deadline deadline);

}  // namespace sim::hccl
