// SPDX-License-Identifier: Apache-2.0
#include "hccl/collectives.h"

#include <algorithm>
#include <cstring>

#include "hccl/reduce.h"

namespace sim::hccl {
namespace {

constexpr size_t kSmall = size_t{64} << 10;  // up to this size every rank gets all data

Header header_of(Kind kind, HcclDataType type, uint64_t outgoing, uint64_t incoming) {
  return {kHeaderMagic, kind, type, HCCL_REDUCE_RESERVED, 0, outgoing, incoming};
}

// One header for all ranks.
void agree(Communicator& group, const Header& header) {
  std::map<uint32_t, Header> headers;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) headers[rank] = header;
  group.agree(headers);
}

// Receives the same number of bytes from every other rank, and sends some. Returns where each
// rank's are; this rank's are at `own`.
std::vector<const void*> collect(Communicator& group, const void* own, size_t bytes,
                                 std::vector<char>& room,
                                 const std::vector<Communicator::Piece>& outgoing) {
  room.resize(bytes * group.ranks());
  std::vector<const void*> inputs;
  std::vector<Communicator::Piece> incoming;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) {
    char* place = room.data() + rank * bytes;
    inputs.push_back(rank == group.rank() ? own : place);
    if (rank != group.rank()) incoming.push_back({rank, place, bytes});
  }
  group.exchange(outgoing, incoming);
  return inputs;
}

std::vector<Communicator::Piece> to_all(const Communicator& group, const void* data, size_t bytes) {
  std::vector<Communicator::Piece> pieces;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) {
    if (rank != group.rank()) pieces.push_back({rank, const_cast<void*>(data), bytes});
  }
  return pieces;
}

std::vector<Communicator::Piece> pieces_of(const Communicator& group, const Layout& layout) {
  std::vector<Communicator::Piece> pieces;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) {
    if (rank != group.rank()) pieces.push_back({rank, layout.at(rank), layout.bytes(rank)});
  }
  return pieces;
}

void move(void* to, const void* from, size_t bytes) {
  if (bytes > 0 && to != from) std::memmove(to, from, bytes);
}

// Each rank reduces its slice, then all ranks get all slices.
void reduce_in_slices(Communicator& group, const void* from, void* to, uint64_t count,
                      HcclDataType type, HcclReduceOp operation) {
  Layout inputs = Layout::even(from, type, group.ranks(), count / group.ranks());
  inputs.counts.back() += count % group.ranks();
  Layout outputs = inputs;
  outputs.base = static_cast<char*>(to);
  uint32_t own = group.rank();
  std::vector<char> room;
  auto slices = collect(group, inputs.at(own), inputs.bytes(own), room, pieces_of(group, inputs));
  reduce(outputs.at(own), slices, inputs.counts[own], type, operation);
  group.exchange(to_all(group, outputs.at(own), outputs.bytes(own)), pieces_of(group, outputs));
}

}  // namespace

Layout Layout::even(const void* base, HcclDataType type, uint32_t ranks, uint64_t count) {
  Layout layout = {static_cast<char*>(const_cast<void*>(base)), type, {}, {}};
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    layout.counts.push_back(count);
    layout.offsets.push_back(rank * count);
  }
  return layout;
}

Layout Layout::given(const void* base, HcclDataType type, uint32_t ranks, const void* counts,
                     const void* offsets) {
  auto* first = static_cast<const uint64_t*>(counts);
  auto* offset = static_cast<const uint64_t*>(offsets);
  return {static_cast<char*>(const_cast<void*>(base)),
          type,
          {first, first + ranks},
          {offset, offset + ranks}};
}

char* Layout::at(uint32_t rank) const { return base + offsets[rank] * size_of(type); }
size_t Layout::bytes(uint32_t rank) const { return counts[rank] * size_of(type); }

npuSimRange Layout::range() const {
  size_t end = 0;
  for (uint32_t rank = 0; rank < counts.size(); ++rank) {
    if (counts[rank] > 0) end = std::max(end, (offsets[rank] + counts[rank]) * size_of(type));
  }
  return {base, end};
}

void all_reduce(Communicator& group, const void* from, void* to, uint64_t count, HcclDataType type,
                HcclReduceOp operation) {
  Header header = header_of(Kind::kAllReduce, type, count, count);
  header.operation = operation;
  agree(group, header);
  size_t bytes = count * size_of(type);
  if (bytes > kSmall) return reduce_in_slices(group, from, to, count, type, operation);
  std::vector<char> room;
  reduce(to, collect(group, from, bytes, room, to_all(group, from, bytes)), count, type, operation);
}

void reduce_scatter(Communicator& group, const Layout& from, void* to, HcclReduceOp operation) {
  uint32_t own = group.rank();
  std::map<uint32_t, Header> headers;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) {
    headers[rank] = header_of(Kind::kReduceScatter, from.type, from.counts[rank], from.counts[own]);
    headers[rank].operation = operation;
  }
  group.agree(headers);
  std::vector<char> room;
  auto inputs = collect(group, from.at(own), from.bytes(own), room, pieces_of(group, from));
  reduce(to, inputs, from.counts[own], from.type, operation);
}

void reduce_to(Communicator& group, const void* from, void* to, uint64_t count, HcclDataType type,
               HcclReduceOp operation, uint32_t root) {
  Header header = header_of(Kind::kReduce, type, count, count);
  header.operation = operation;
  header.root = root;
  agree(group, header);
  size_t bytes = count * size_of(type);
  if (group.rank() != root) {
    return group.exchange({{root, const_cast<void*>(from), bytes}}, {});
  }
  std::vector<char> room;
  reduce(to, collect(group, from, bytes, room, {}), count, type, operation);
}

void all_gather(Communicator& group, const void* from, const Layout& to) {
  uint32_t own = group.rank();
  std::map<uint32_t, Header> headers;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) {
    headers[rank] = header_of(Kind::kAllGather, to.type, to.counts[own], to.counts[rank]);
  }
  group.agree(headers);
  move(to.at(own), from, to.bytes(own));
  group.exchange(to_all(group, to.at(own), to.bytes(own)), pieces_of(group, to));
}

void broadcast(Communicator& group, void* buffer, uint64_t count, HcclDataType type,
               uint32_t root) {
  Header header = header_of(Kind::kBroadcast, type, count, count);
  header.root = root;
  agree(group, header);
  size_t bytes = count * size_of(type);
  if (group.rank() == root) {
    group.exchange(to_all(group, buffer, bytes), {});
  } else {
    group.exchange({}, {{root, buffer, bytes}});
  }
}

void scatter(Communicator& group, const Layout& from, void* to, uint32_t root) {
  uint64_t count = from.counts.front();
  Header header = header_of(Kind::kScatter, from.type, count, count);
  header.root = root;
  agree(group, header);
  if (group.rank() != root) {
    return group.exchange({}, {{root, to, count * size_of(from.type)}});
  }
  group.exchange(pieces_of(group, from), {});
  move(to, from.at(root), from.bytes(root));
}

void all_to_all(Communicator& group, const Layout& from, const Layout& to) {
  std::map<uint32_t, Header> headers;
  for (uint32_t rank = 0; rank < group.ranks(); ++rank) {
    headers[rank] = header_of(Kind::kAllToAll, from.type, from.counts[rank], to.counts[rank]);
  }
  group.agree(headers);
  uint32_t own = group.rank();
  move(to.at(own), from.at(own), from.bytes(own));
  group.exchange(pieces_of(group, from), pieces_of(group, to));
}

void barrier(Communicator& group) {
  agree(group, header_of(Kind::kBarrier, HCCL_DATA_TYPE_INT8, 0, 0));
}

// Only the receiver gets the header, because a sender does not wait for it.
void send_and_receive(Communicator& group, const std::vector<HcclSendRecvItem>& items) {
  std::vector<Header> headers(items.size());
  std::vector<Header> received(items.size());
  std::vector<Communicator::Piece> outgoing;
  std::vector<Communicator::Piece> incoming;
  for (size_t i = 0; i < items.size(); ++i) {
    const HcclSendRecvItem& item = items[i];
    size_t bytes = item.count * size_of(item.dataType);
    headers[i] = header_of(Kind::kPointToPoint, item.dataType, item.count, item.count);
    if (item.sendRecvType == HCCL_SEND) {
      outgoing.push_back({item.remoteRank, &headers[i], sizeof(Header)});
      outgoing.push_back({item.remoteRank, item.buf, bytes});
    } else {
      incoming.push_back({item.remoteRank, &received[i], sizeof(Header), &headers[i]});
      incoming.push_back({item.remoteRank, item.buf, bytes});
    }
  }
  group.exchange(outgoing, incoming);
}

}  // namespace sim::hccl
