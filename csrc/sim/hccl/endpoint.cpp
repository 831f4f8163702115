// SPDX-License-Identifier: Apache-2.0
#include "hccl/endpoint.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <string>
#include <thread>

namespace sim::hccl {
namespace {

constexpr uint64_t kMagic = 0x6c63636869732d6e;
constexpr std::chrono::seconds kHelloTimeout{10};

// As in HCCL, the address in HCCL_IF_IP, or that of the interface in HCCL_SOCKET_IFNAME. Without
// either, the loopback address, so that the simulator is not reachable from other hosts by default.
uint32_t host_ip() {
  in_addr ip;
  const char* address = std::getenv("HCCL_IF_IP");
  if (address != nullptr && inet_pton(AF_INET, address, &ip) == 1) return ip.s_addr;
  const char* wanted = std::getenv("HCCL_SOCKET_IFNAME");
  uint32_t found = htonl(INADDR_LOOPBACK);
  ifaddrs* all = nullptr;
  if (wanted == nullptr || getifaddrs(&all) != 0) return found;
  for (ifaddrs* entry = all; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != AF_INET) continue;
    if (std::strncmp(entry->ifa_name, wanted, std::strlen(wanted)) != 0) continue;
    found = reinterpret_cast<sockaddr_in*>(entry->ifa_addr)->sin_addr.s_addr;
    break;
  }
  freeifaddrs(all);
  return found;
}

sockaddr_in socket_address(const Address& address) {
  sockaddr_in name = {};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = address.ip;
  name.sin_port = address.port;
  return name;
}

void set_up(int file) {
  int on = 1;
  setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  fcntl(file, F_SETFL, fcntl(file, F_GETFL) | O_NONBLOCK);
}

// Accepted connections that have not been used yet. Never destroyed, because its threads outlive
// main.
class Endpoint {
 public:
  static Endpoint& instance() {
    static auto* once = new Endpoint;
    return *once;
  }

  const Address& address() const { return address_; }

  std::unique_ptr<Arrival> take(uint64_t key, Purpose purpose, uint32_t rank, Deadline deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::list<std::unique_ptr<Arrival>>::iterator found;
    bool in_time = arrived_.wait_until(lock, deadline, [&] {
      found = std::find_if(arrivals_.begin(), arrivals_.end(), [&](const auto& arrival) {
        const Hello& hello = arrival->hello;
        return hello.key == key && hello.purpose == purpose &&
               (rank == any_rank || hello.rank == rank);
      });
      return found != arrivals_.end();
    });
    if (!in_time) return nullptr;
    auto arrival = std::move(*found);
    arrivals_.erase(found);
    return arrival;
  }

 private:
  Endpoint() {
    address_ = {host_ip(), 0, 0};
    int file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in name = socket_address(address_);
    socklen_t length = sizeof(name);
    auto* any = reinterpret_cast<sockaddr*>(&name);
    if (file < 0 || bind(file, any, length) != 0 || listen(file, SOMAXCONN) != 0) return;
    if (getsockname(file, any, &length) != 0) return;
    address_.port = name.sin_port;
    std::thread([this, file] { accept_from(file); }).detach();
  }

  void accept_from(int listener) {
    for (;;) {
      int file = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      if (file < 0) continue;
      set_up(file);
      std::thread([this, file] { greet(Socket(file)); }).detach();
    }
  }

  void greet(Socket socket) {
    auto arrival = std::make_unique<Arrival>();
    Deadline deadline = std::chrono::steady_clock::now() + kHelloTimeout;
    Hello& hello = arrival->hello;
    if (!receive_all(socket.file(), &hello, sizeof(hello), deadline)) return;
    if (hello.magic != kMagic) return;
    arrival->socket = std::move(socket);
    std::lock_guard<std::mutex> lock(mutex_);
    arrivals_.push_back(std::move(arrival));
    arrived_.notify_all();
  }

  Address address_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::list<std::unique_ptr<Arrival>> arrivals_;
};

bool wait_for(int file, short events, Deadline deadline) {
  pollfd entry = {file, events, 0};
  int ready;
  do {
    ready = poll(&entry, 1, poll_timeout(deadline));
  } while (ready < 0 && errno == EINTR);
  return ready > 0;
}

}  // namespace

Socket::~Socket() {
  if (file_ >= 0) close(file_);
}

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(file_, other.file_);
  return *this;
}

int poll_timeout(Deadline deadline) {
  auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::steady_clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, 60000));
}

Address own_address() { return Endpoint::instance().address(); }

Socket connect_to(const Address& address, const Hello& hello, Deadline deadline) {
  Socket connection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connection.file() < 0) return connection;
  set_up(connection.file());
  sockaddr_in name = socket_address(address);
  int result = connect(connection.file(), reinterpret_cast<sockaddr*>(&name), sizeof(name));
  if (result != 0 && errno != EINPROGRESS) return Socket();
  int error = 0;
  socklen_t length = sizeof(error);
  if (!wait_for(connection.file(), POLLOUT, deadline)) return Socket();
  getsockopt(connection.file(), SOL_SOCKET, SO_ERROR, &error, &length);
  if (error != 0) return Socket();
  Hello greeting = hello;
  greeting.magic = kMagic;
  bool sent = send_all(connection.file(), &greeting, sizeof(greeting), deadline);
  return sent ? std::move(connection) : Socket();
}

std::unique_ptr<Arrival> take_arrival(uint64_t key, Purpose purpose, uint32_t rank,
                                      Deadline deadline) {
  return Endpoint::instance().take(key, purpose, rank, deadline);
}

bool send_all(int file, const void* data, size_t bytes, Deadline deadline) {
  auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    ssize_t sent = send(file, from, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EINTR) return false;
    if (sent < 0 && !wait_for(file, POLLOUT, deadline)) return false;
    if (sent <= 0) continue;
    from += sent;
    bytes -= static_cast<size_t>(sent);
  }
  return true;
}

bool receive_all(int file, void* data, size_t bytes, Deadline deadline) {
  auto* to = static_cast<char*>(data);
  while (bytes > 0) {
    ssize_t received = recv(file, to, bytes, 0);
    if (received == 0) return false;
    if (received < 0 && errno != EAGAIN && errno != EINTR) return false;
    if (received < 0 && !wait_for(file, POLLIN, deadline)) return false;
    if (received <= 0) continue;
    to += received;
    bytes -= static_cast<size_t>(received);
  }
  return true;
}

bool is_gone(int file) {
  char byte;
  ssize_t received = recv(file, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return received == 0 || (received < 0 && errno != EAGAIN && errno != EINTR);
}

}  // namespace sim::hccl
