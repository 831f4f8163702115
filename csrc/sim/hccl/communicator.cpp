// SPDX-License-Identifier: Apache-2.0
#include "hccl/communicator.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <utility>

namespace sim::hccl {
namespace {

constexpr std::chrono::seconds kLeaveTimeout{10};
constexpr size_t kPiece = size_t{1} << 20;

// The root's answer to a joining rank.
struct Answer {
  HcclResult code;
  uint32_t about;  // the rank that the code is about
};

uint64_t mix(uint64_t a, uint64_t b) {
  a ^= b + 0x9e3779b97f4a7c15 + (a << 6) + (a >> 2);
  a *= 0xff51afd7ed558ccd;
  return a ^ a >> 33;
}

uint64_t key_of(uint64_t parent, uint64_t id, const std::vector<uint32_t>& members) {
  uint64_t key = mix(parent, id);
  for (uint32_t member : members) key = mix(key, member);
  return key;
}

Deadline in(std::chrono::seconds timeout) { return std::chrono::steady_clock::now() + timeout; }

std::string describe(const Header& header) {
  static const char* const kNames[] = {"?",          "all-reduce",   "reduce-scatter", "reduce",
                                       "all-gather", "broadcast",    "scatter",        "all-to-all",
                                       "barrier",    "send/receive", "destroy"};
  auto kind = std::min<uint32_t>(static_cast<uint32_t>(header.kind), 10);
  return std::string(kNames[kind]) + " of type " + std::to_string(header.type) + ", operation " +
         std::to_string(header.operation) + ", root " + std::to_string(header.root) + ", " +
         std::to_string(header.outgoing) + " elements to and " + std::to_string(header.incoming) +
         " from the other";
}

bool match(const Header& mine, const Header& theirs) {
  return theirs.magic == kHeaderMagic && mine.kind == theirs.kind && mine.type == theirs.type &&
         mine.operation == theirs.operation && mine.root == theirs.root &&
         mine.outgoing == theirs.incoming && mine.incoming == theirs.outgoing;
}

}  // namespace

uint64_t new_key() {
  uint64_t key = 0;
  while (getrandom(&key, sizeof(key), 0) != sizeof(key)) {
  }
  return key;
}

Communicator::Communicator(uint64_t key, uint32_t ranks, uint32_t rank, const Options& options,
                           const Address& root)
    : key_(key), ranks_(ranks), rank_(rank), options_(options), addresses_(ranks), peers_(ranks) {
  Deadline deadline = in(options.connect_timeout);
  if (ranks > 1) meet(root, deadline);
  connect(deadline);
  take_buffers();
}

Communicator::Communicator(const Communicator& parent, uint64_t id,
                           const std::vector<uint32_t>& members, uint32_t rank,
                           const Options& options)
    : key_(key_of(parent.key_, id, members)),
      ranks_(static_cast<uint32_t>(members.size())),
      rank_(rank),
      options_(options),
      peers_(members.size()) {
  for (uint32_t member : members) addresses_.push_back(parent.addresses_[member]);
  connect(in(options.connect_timeout));
  take_buffers();
}

Communicator::~Communicator() {
  for (void* buffer : buffers_) {
    if (buffer != nullptr) npuSimFree(buffer);
  }
}

void Communicator::take_buffers() {
  for (void*& buffer : buffers_) {
    if (options_.buffer_bytes == 0) continue;
    if (npuSimAllocate(&buffer, options_.buffer_bytes) == ACL_SUCCESS) continue;
    for (void* taken : buffers_) {
      if (taken != nullptr) npuSimFree(taken);
    }
    throw Failure{HCCL_E_OOM, "no device memory for a buffer of " +
                                  std::to_string(options_.buffer_bytes) +
                                  " bytes; make HCCL_BUFFSIZE smaller"};
  }
}

Hello Communicator::hello(Purpose purpose) const {
  return {0, key_, purpose, rank_, ranks_, own_address(), npuSimDeviceKey()};
}

void Communicator::meet(const Address& root, Deadline deadline) {
  if (own_address().port == 0) throw Failure{HCCL_E_TCP_CONNECT, "cannot listen on this host"};
  // The rank in the process that created the root info is the root, unless it has joined already.
  static std::mutex mutex;
  static auto* served = new std::map<uint64_t, bool>;
  bool serves = false;
  if (root == own_address()) {
    std::lock_guard<std::mutex> lock(mutex);
    serves = !std::exchange((*served)[key_], true);
  }
  serves ? serve(deadline) : ask(root, deadline);
}

// Waits for all ranks and sends each the addresses of all.
void Communicator::serve(Deadline deadline) {
  std::vector<std::unique_ptr<Arrival>> arrivals(ranks_);
  std::map<uint64_t, uint32_t> devices = {{npuSimDeviceKey(), rank_}};
  Failure failure;
  uint32_t about = 0;
  for (uint32_t missing = ranks_ - 1; missing > 0 && failure.code == HCCL_SUCCESS; --missing) {
    auto arrival = take_arrival(key_, Purpose::kJoin, any_rank, deadline);
    if (arrival == nullptr) {
      failure = {HCCL_E_TIMEOUT, std::to_string(missing) + " of " + std::to_string(ranks_) +
                                     " ranks did not come in time (HCCL_CONNECT_TIMEOUT)"};
      break;
    }
    const Hello hello = arrival->hello;
    about = hello.rank;
    bool known = hello.rank >= ranks_ || hello.rank == rank_ || arrivals[hello.rank] != nullptr;
    if (hello.ranks != ranks_ || known) {
      failure = {HCCL_E_PARA, "rank " + std::to_string(hello.rank) + " of " +
                                  std::to_string(hello.ranks) + " does not fit " +
                                  std::to_string(ranks_) + " ranks, or came twice"};
    } else if (!devices.emplace(hello.device, hello.rank).second) {
      failure = {HCCL_E_PARA, "ranks " + std::to_string(devices[hello.device]) + " and " +
                                  std::to_string(hello.rank) + " use the same device"};
    }
    size_t at = hello.rank < ranks_ && arrivals[hello.rank] == nullptr ? hello.rank : rank_;
    addresses_[at] = hello.address;
    arrivals[at] = std::move(arrival);
  }
  addresses_[rank_] = own_address();
  Answer answer = {failure.code, about};
  for (auto& arrival : arrivals) {
    if (arrival == nullptr) continue;
    int file = arrival->socket.file();
    send_all(file, &answer, sizeof(answer), deadline);
    if (failure.code == HCCL_SUCCESS) {
      send_all(file, addresses_.data(), addresses_.size() * sizeof(Address), deadline);
    }
  }
  if (failure.code != HCCL_SUCCESS) throw failure;
}

void Communicator::ask(const Address& root, Deadline deadline) {
  Socket connection = connect_to(root, hello(Purpose::kJoin), deadline);
  if (connection.file() < 0) {
    throw Failure{HCCL_E_TCP_CONNECT, "the process that made the root info cannot be reached"};
  }
  Answer answer;
  bool answered = receive_all(connection.file(), &answer, sizeof(answer), deadline);
  if (answered && answer.code != HCCL_SUCCESS) {
    throw Failure{answer.code, "the root refused rank " + std::to_string(answer.about) +
                                   ", or waited in vain for others"};
  }
  size_t bytes = addresses_.size() * sizeof(Address);
  if (!answered || !receive_all(connection.file(), addresses_.data(), bytes, deadline)) {
    throw Failure{HCCL_E_TIMEOUT,
                  "the root did not answer; some rank did not come in time "
                  "(HCCL_CONNECT_TIMEOUT)"};
  }
}

void Communicator::connect(Deadline deadline) {
  for (uint32_t other = 0; other < ranks_; ++other) {
    if (other == rank_) continue;
    if (other < rank_) {
      peers_[other] = connect_to(addresses_[other], hello(Purpose::kMesh), deadline);
    } else if (auto arrival = take_arrival(key_, Purpose::kMesh, other, deadline)) {
      peers_[other] = std::move(arrival->socket);
    }
    if (peers_[other].file() < 0) {
      throw Failure{HCCL_E_TCP_CONNECT, "no connection to rank " + std::to_string(other) +
                                            " in time (HCCL_CONNECT_TIMEOUT)"};
    }
  }
}

// Work of a communicator, which a graph may run many times.
struct Communicator::Turns {
  std::weak_ptr<Communicator> communicator;
  std::string name;  // of the communicator
  std::string call;
  Work work;

  struct Turn {
    std::shared_ptr<Communicator> communicator;
    uint64_t number;
  };
  std::mutex mutex;
  std::deque<Turn> waiting;  // submitted to streams, not run yet

  void take() {
    auto alive = communicator.lock();
    if (alive == nullptr || alive->leaving_) {
      npuSimFault(("a graph executes " + call + " over communicator " + name +
                   ", which was destroyed; capture the graph anew")
                      .c_str());
    }
    std::lock_guard<std::mutex> launches(alive->launch_mutex_);
    std::lock_guard<std::mutex> lock(mutex);
    waiting.push_back({alive, alive->launched_++});
  }

  int run() { return finish(work); }
  void skip() {
    finish([](Communicator&) {});
  }

 private:
  int finish(const Work& next) {
    std::unique_lock<std::mutex> lock(mutex);
    Turn turn = std::move(waiting.front());
    waiting.pop_front();
    lock.unlock();
    return turn.communicator->run(turn.number, call, next);
  }
};

HcclResult Communicator::launch(const char* call, aclrtStream stream,
                                const std::vector<npuSimRange>& touched, Work work) {
  if (suspended_) return static_cast<HcclResult>(npuSimFail(HCCL_E_SUSPENDING, call));
  if (HcclResult broken = state()) return broken;
  auto turns = std::make_unique<Turns>();
  turns->communicator = weak_from_this();
  turns->name = name();
  turns->call = call;
  turns->work = std::move(work);
  const npuSimKernel kernel = {
      .name = call,
      .argument = turns.release(),
      .run = [](void* turns) { return static_cast<Turns*>(turns)->run(); },
      .launched = [](void* turns) { static_cast<Turns*>(turns)->take(); },
      .skip = [](void* turns) { static_cast<Turns*>(turns)->skip(); },
      .release = [](void* turns) { delete static_cast<Turns*>(turns); },
  };
  aclError error = npuSimLaunch(stream, &kernel, touched.data(), touched.size());
  return error == ACL_SUCCESS ? HCCL_SUCCESS : HCCL_E_RUNTIME;
}

int Communicator::run(uint64_t turn, const std::string& call, const Work& work) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return finished_ == turn; });
  }
  Failure failure;
  try {
    if (failure_.code == HCCL_SUCCESS) work(*this);
  } catch (const Failure& thrown) {
    failure = thrown;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure.code != HCCL_SUCCESS && failure_.code == HCCL_SUCCESS) {
    failure_ = {failure.code, call + " on rank " + std::to_string(rank_) + " of communicator " +
                                  name() + ": " + failure.reason};
    // The other ranks wait for this one, so tell them.
    for (Socket& peer : peers_) shutdown(peer.file(), SHUT_RDWR);
  }
  ++finished_;
  changed_.notify_all();
  if (failure_.code == HCCL_SUCCESS) return 0;
  npuSimFail(failure_.code, failure_.reason.c_str());
  return failure_.code == HCCL_E_TIMEOUT  ? ACL_ERROR_RT_FFTS_PLUS_TIMEOUT
         : failure_.code == HCCL_E_REMOTE ? ACL_ERROR_RT_SUSPECT_REMOTE_ERROR
                                          : ACL_ERROR_RT_AICPU_EXCEPTION;
}

HcclResult Communicator::state() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.code != HCCL_SUCCESS) {
    npuSimFail(failure_.code, failure_.reason.c_str());
    return failure_.code;
  }
  for (uint32_t other = 0; other < ranks_; ++other) {
    if (other == rank_ || !is_gone(peers_[other].file())) continue;
    std::string reason = "communicator " + name() + ": rank " + std::to_string(other) + " is gone";
    npuSimFail(HCCL_E_REMOTE, reason.c_str());
    return HCCL_E_REMOTE;
  }
  return HCCL_SUCCESS;
}

void Communicator::leave() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    std::lock_guard<std::mutex> launches(launch_mutex_);
    changed_.wait_for(lock, kLeaveTimeout, [&] { return finished_ == launched_; });
  }
  leaving_ = true;
  const Header goodbye = {kHeaderMagic, Kind::kGoodbye, {}, {}, 0, 0, 0};
  for (Socket& peer : peers_) {
    if (peer.file() < 0) continue;
    if (send(peer.file(), &goodbye, sizeof(goodbye), MSG_NOSIGNAL) < 0) continue;
    shutdown(peer.file(), SHUT_WR);
  }
}

void Communicator::fail_at(uint32_t rank) const {
  if (leaving_) throw Failure{HCCL_E_UNAVAIL, "destroyed before it was complete"};
  throw Failure{HCCL_E_REMOTE,
                "rank " + std::to_string(rank) + " is gone, or failed in this operation"};
}

void Communicator::agree(const std::map<uint32_t, Header>& headers) {
  std::map<uint32_t, Header> received;
  std::vector<Piece> outgoing;
  std::vector<Piece> incoming;
  for (const auto& [rank, header] : headers) {
    if (rank == rank_) continue;
    outgoing.push_back({rank, const_cast<Header*>(&header), sizeof(header)});
    incoming.push_back({rank, &received[rank], sizeof(header), &header});
  }
  exchange(outgoing, incoming);
}

// Moves as much as possible without waiting.
void Communicator::advance(uint32_t rank, std::vector<Piece>& pieces, size_t& next,
                           bool outgoing) const {
  int file = peers_[rank].file();
  for (; next < pieces.size(); ++next) {
    Piece& piece = pieces[next];
    while (piece.bytes > 0) {
      size_t bytes = std::min(piece.bytes, kPiece);
      ssize_t moved =
          outgoing ? send(file, piece.data, bytes, MSG_NOSIGNAL) : recv(file, piece.data, bytes, 0);
      if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (moved <= 0) fail_at(rank);
      piece.data = static_cast<char*>(piece.data) + moved;
      piece.bytes -= static_cast<size_t>(moved);
    }
    if (piece.expected == nullptr) continue;
    const Header& theirs = static_cast<const Header*>(piece.data)[-1];
    if (match(*piece.expected, theirs)) continue;
    throw Failure{HCCL_E_PARA, "the ranks differ: this one has " + describe(*piece.expected) +
                                   "; rank " + std::to_string(rank) + " has " + describe(theirs)};
  }
}

void Communicator::exchange(const std::vector<Piece>& outgoing,
                            const std::vector<Piece>& incoming) {
  struct Side {
    std::vector<Piece> pieces;
    size_t next = 0;
    short events(short wanted) const { return next < pieces.size() ? wanted : short{0}; }
  };
  std::vector<Side> sends(ranks_);
  std::vector<Side> receives(ranks_);
  for (const Piece& piece : outgoing) sends[piece.rank].pieces.push_back(piece);
  for (const Piece& piece : incoming) receives[piece.rank].pieces.push_back(piece);
  const Deadline deadline = in(options_.execute_timeout);
  for (;;) {
    std::vector<pollfd> waiting;
    for (uint32_t rank = 0; rank < ranks_; ++rank) {
      advance(rank, sends[rank].pieces, sends[rank].next, true);
      advance(rank, receives[rank].pieces, receives[rank].next, false);
      auto events = static_cast<short>(sends[rank].events(POLLOUT) | receives[rank].events(POLLIN));
      if (events != 0) waiting.push_back({peers_[rank].file(), events, 0});
    }
    if (waiting.empty()) return;
    if (poll(waiting.data(), waiting.size(), poll_timeout(deadline)) != 0) continue;
    if (std::chrono::steady_clock::now() < deadline) continue;
    throw Failure{HCCL_E_TIMEOUT, "another rank did not come within " +
                                      std::to_string(options_.execute_timeout.count()) +
                                      " s (HCCL_EXEC_TIMEOUT)"};
  }
}

}  // namespace sim::hccl
