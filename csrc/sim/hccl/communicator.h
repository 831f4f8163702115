// SPDX-License-Identifier: Apache-2.0
//
// A rank's side of a communicator: a connection to every other rank, and the operations on them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "control.h"
#include "hccl/endpoint.h"
#include "third_party/hccl/inc/hccl/hccl.h"

namespace sim::hccl {

// Why an operation or the creation of a communicator failed.
struct Failure {
  HcclResult code = HCCL_SUCCESS;
  std::string reason;
};

struct Options {
  std::string name;
  size_t buffer_bytes;  // of each of the two buffers
  std::chrono::seconds connect_timeout;
  std::chrono::seconds execute_timeout;
};

// What the ranks of an operation must agree on.
enum class Kind : uint32_t {
  kAllReduce = 1,
  kReduceScatter,
  kReduce,
  kAllGather,
  kBroadcast,
  kScatter,
  kAllToAll,
  kBarrier,
  kPointToPoint,
  kGoodbye,
};

constexpr uint64_t kHeaderMagic = 0x7265646165686363;

struct Header {
  uint64_t magic;
  Kind kind;
  HcclDataType type;
  HcclReduceOp operation;
  uint32_t root;
  uint64_t outgoing;  // elements from the sender of this header to its receiver
  uint64_t incoming;  // elements that the sender expects from the receiver
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  using Work = std::function<void(Communicator&)>;

  // Connects to the other ranks through the root. Throws Failure.
  Communicator(uint64_t key, uint32_t ranks, uint32_t rank, const Options& options,
               const Address& root);
  // Of these ranks of `parent`, in this order.
  Communicator(const Communicator& parent, uint64_t id, const std::vector<uint32_t>& members,
               uint32_t rank, const Options& options);
  ~Communicator();

  const std::string& name() const { return options_.name; }
  uint32_t ranks() const { return ranks_; }
  uint32_t rank() const { return rank_; }

  // Appends the work to the stream. The work of a communicator runs in the order of these calls, on
  // whatever streams. A Failure that it throws breaks the communicator.
  HcclResult launch(const char* call, aclrtStream stream, const std::vector<npuSimRange>& touched,
                    Work work);

  // What broke it, or that another rank is gone; otherwise HCCL_SUCCESS.
  HcclResult state();
  void suspend(bool suspended) { suspended_ = suspended; }
  void leave();  // finishes what can finish within a few seconds, then aborts the rest

  // --- For the work ---

  // Sends the header to every rank in `headers`, and compares it with theirs.
  void agree(const std::map<uint32_t, Header>& headers);

  struct Piece {
    uint32_t rank;
    void* data;
    size_t bytes;
    const Header* expected = nullptr;  // what an incoming header must match
  };
  // Sends and receives at the same time; for each rank in the given order.
  void exchange(const std::vector<Piece>& outgoing, const std::vector<Piece>& incoming);

 private:
  struct Turns;

  void take_buffers();
  void meet(const Address& root, Deadline deadline);
  void serve(Deadline deadline);
  void ask(const Address& root, Deadline deadline);
  void connect(Deadline deadline);
  Hello hello(Purpose purpose) const;
  int run(uint64_t turn, const std::string& call, const Work& work);
  void advance(uint32_t rank, std::vector<Piece>& pieces, size_t& next, bool outgoing) const;
  [[noreturn]] void fail_at(uint32_t rank) const;

  const uint64_t key_;
  const uint32_t ranks_;
  const uint32_t rank_;
  const Options options_;
  std::vector<Address> addresses_;
  std::vector<Socket> peers_;
  void* buffers_[2] = {};

  std::mutex launch_mutex_;
  uint64_t launched_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t finished_ = 0;
  Failure failure_;
  std::atomic<bool> suspended_{false};
  std::atomic<bool> leaving_{false};
};

// A unique number for a new communicator.
uint64_t new_key();

}  // namespace sim::hccl
