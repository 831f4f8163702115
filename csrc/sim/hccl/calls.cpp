// SPDX-License-Identifier: Apache-2.0
//
// Collective communication: the calls that move data. Each checks its arguments and submits the
// work to the stream.
#include "hccl/calls.h"

#include <cstring>

#include "hccl/collectives.h"
#include "hccl/reduce.h"

using namespace sim::hccl;

namespace {

using Group = std::shared_ptr<Communicator>;

// The calls between HcclGroupStart and HcclGroupEnd of one thread.
struct Batch {
  Group group;
  aclrtStream stream;
  std::vector<HcclSendRecvItem> items;
};
thread_local int t_depth = 0;
thread_local std::vector<Batch> t_batches;

HcclResult check_type(const char* call, HcclDataType type) {
  if (size_of(type) > 0) return HCCL_SUCCESS;
  return refuse(HCCL_E_PARA, call, "unknown data type " + std::to_string(type));
}

HcclResult check_reduction(const char* call, HcclDataType type, HcclReduceOp operation) {
  if (HcclResult error = check_type(call, type)) return error;
  if (reduces(type, operation)) return HCCL_SUCCESS;
  return refuse(HCCL_E_NOT_SUPPORT, call,
                "operation " + std::to_string(operation) + " is not supported for type " +
                    std::to_string(type));
}

HcclResult check_rank(const char* call, const Group& group, uint32_t rank) {
  if (rank < group->ranks()) return HCCL_SUCCESS;
  return refuse(
      HCCL_E_PARA, call,
      "there is no rank " + std::to_string(rank) + " of " + std::to_string(group->ranks()));
}

HcclResult check_peer(const char* call, const Group& group, uint32_t rank) {
  if (HcclResult error = check_rank(call, group, rank)) return error;
  if (rank != group->rank()) return HCCL_SUCCESS;
  return refuse(HCCL_E_PARA, call, "a rank cannot send to or receive from itself");
}

HcclResult launch(const char* call, const Group& group, aclrtStream stream,
                  const std::vector<npuSimRange>& touched, Communicator::Work work) {
  for (const npuSimRange& range : touched) {
    if (range.bytes > 0 && range.begin == nullptr) return refuse(HCCL_E_PTR, call, "null buffer");
  }
  return group->launch(call, stream, touched, std::move(work));
}

HcclResult transfer(const char* call, const Group& group, const HcclSendRecvItem* items,
                    uint32_t count, aclrtStream stream) {
  std::vector<npuSimRange> touched;
  for (uint32_t i = 0; i < count; ++i) {
    if (HcclResult error = check_peer(call, group, items[i].remoteRank)) return error;
    if (HcclResult error = check_type(call, items[i].dataType)) return error;
    touched.push_back({items[i].buf, items[i].count * size_of(items[i].dataType)});
  }
  std::vector<HcclSendRecvItem> copy(items, items + count);
  if (t_depth > 0) {
    t_batches.push_back({group, stream, copy});
    return HCCL_SUCCESS;
  }
  return launch(call, group, stream, touched,
                [=](Communicator& ranks) { send_and_receive(ranks, copy); });
}

HcclResult reduce_scatter_call(const char* call, const Group& group, const Layout& from, void* to,
                               HcclReduceOp operation, aclrtStream stream) {
  if (HcclResult error = check_reduction(call, from.type, operation)) return error;
  size_t bytes = from.bytes(group->rank());
  return launch(call, group, stream, {from.range(), {to, bytes}},
                [=](Communicator& ranks) { reduce_scatter(ranks, from, to, operation); });
}

HcclResult all_gather_call(const char* call, const Group& group, const void* from, const Layout& to,
                           aclrtStream stream) {
  if (HcclResult error = check_type(call, to.type)) return error;
  size_t bytes = to.bytes(group->rank());
  return launch(call, group, stream, {{from, bytes}, to.range()},
                [=](Communicator& ranks) { all_gather(ranks, from, to); });
}

HcclResult all_to_all_call(const char* call, const Group& group, const Layout& from,
                           const Layout& to, aclrtStream stream) {
  if (HcclResult error = check_type(call, from.type)) return error;
  uint32_t own = group->rank();
  if (from.type != to.type || from.counts[own] != to.counts[own]) {
    return refuse(HCCL_E_PARA, call, "what is sent and what is received differ");
  }
  return launch(call, group, stream, {from.range(), to.range()},
                [=](Communicator& ranks) { all_to_all(ranks, from, to); });
}

}  // namespace

extern "C" {

HcclResult HcclAllReduce(void* from, void* to, uint64_t count, HcclDataType type,
                         HcclReduceOp operation, HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  HCCL_SKIP_EMPTY(count);
  if (HcclResult error = check_reduction(__func__, type, operation)) return error;
  size_t bytes = count * size_of(type);
  return launch(__func__, group, stream, {{from, bytes}, {to, bytes}},
                [=](Communicator& ranks) { all_reduce(ranks, from, to, count, type, operation); });
}

HcclResult HcclReduce(void* from, void* to, uint64_t count, HcclDataType type,
                      HcclReduceOp operation, uint32_t root, HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  HCCL_SKIP_EMPTY(count);
  if (HcclResult error = check_reduction(__func__, type, operation)) return error;
  if (HcclResult error = check_rank(__func__, group, root)) return error;
  size_t bytes = count * size_of(type);
  size_t result = group->rank() == root ? bytes : 0;
  return launch(__func__, group, stream, {{from, bytes}, {to, result}}, [=](Communicator& ranks) {
    reduce_to(ranks, from, to, count, type, operation, root);
  });
}

HcclResult HcclReduceScatter(void* from, void* to, uint64_t count, HcclDataType type,
                             HcclReduceOp operation, HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  Layout layout = Layout::even(from, type, group->ranks(), count);
  return reduce_scatter_call(__func__, group, layout, to, operation, stream);
}

HcclResult HcclReduceScatterV(void* from, const void* counts, const void* offsets, void* to,
                              uint64_t count, HcclDataType type, HcclReduceOp operation,
                              HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  if (counts == nullptr || offsets == nullptr) return refuse(HCCL_E_PTR, __func__, "null array");
  Layout layout = Layout::given(from, type, group->ranks(), counts, offsets);
  if (layout.counts[group->rank()] != count) {
    return refuse(HCCL_E_PARA, __func__, "what this rank sends itself and what it gets differ");
  }
  return reduce_scatter_call(__func__, group, layout, to, operation, stream);
}

HcclResult HcclAllGather(void* from, void* to, uint64_t count, HcclDataType type, HcclComm comm,
                         aclrtStream stream) {
  HCCL_FIND(group, comm);
  Layout layout = Layout::even(to, type, group->ranks(), count);
  return all_gather_call(__func__, group, from, layout, stream);
}

HcclResult HcclAllGatherV(void* from, uint64_t count, void* to, const void* counts,
                          const void* offsets, HcclDataType type, HcclComm comm,
                          aclrtStream stream) {
  HCCL_FIND(group, comm);
  if (counts == nullptr || offsets == nullptr) return refuse(HCCL_E_PTR, __func__, "null array");
  Layout layout = Layout::given(to, type, group->ranks(), counts, offsets);
  if (layout.counts[group->rank()] != count) {
    return refuse(HCCL_E_PARA, __func__, "what this rank sends and what it gets of it differ");
  }
  return all_gather_call(__func__, group, from, layout, stream);
}

HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root,
                         HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  HCCL_SKIP_EMPTY(count);
  if (HcclResult error = check_type(__func__, type)) return error;
  if (HcclResult error = check_rank(__func__, group, root)) return error;
  return launch(__func__, group, stream, {{buffer, count * size_of(type)}},
                [=](Communicator& ranks) { broadcast(ranks, buffer, count, type, root); });
}

HcclResult HcclScatter(void* from, void* to, uint64_t count, HcclDataType type, uint32_t root,
                       HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  if (HcclResult error = check_type(__func__, type)) return error;
  if (HcclResult error = check_rank(__func__, group, root)) return error;
  Layout layout = Layout::even(from, type, group->ranks(), count);
  npuSimRange source = group->rank() == root ? layout.range() : npuSimRange{nullptr, 0};
  return launch(__func__, group, stream, {source, {to, count * size_of(type)}},
                [=](Communicator& ranks) { scatter(ranks, layout, to, root); });
}

HcclResult HcclAlltoAll(const void* from, uint64_t from_count, HcclDataType from_type,
                        const void* to, uint64_t to_count, HcclDataType to_type, HcclComm comm,
                        aclrtStream stream) {
  HCCL_FIND(group, comm);
  return all_to_all_call(__func__, group, Layout::even(from, from_type, group->ranks(), from_count),
                         Layout::even(to, to_type, group->ranks(), to_count), stream);
}

HcclResult HcclAlltoAllV(const void* from, const void* from_counts, const void* from_offsets,
                         HcclDataType from_type, const void* to, const void* to_counts,
                         const void* to_offsets, HcclDataType to_type, HcclComm comm,
                         aclrtStream stream) {
  HCCL_FIND(group, comm);
  for (const void* array : {from_counts, from_offsets, to_counts, to_offsets}) {
    if (array == nullptr) return refuse(HCCL_E_PTR, __func__, "null array");
  }
  return all_to_all_call(__func__, group,
                         Layout::given(from, from_type, group->ranks(), from_counts, from_offsets),
                         Layout::given(to, to_type, group->ranks(), to_counts, to_offsets), stream);
}

// matrix[i][j] elements go from rank i to rank j; each rank's elements are contiguous.
HcclResult HcclAlltoAllVC(const void* from, const void* matrix, HcclDataType from_type,
                          const void* to, HcclDataType to_type, HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  if (matrix == nullptr) return refuse(HCCL_E_PTR, __func__, "null array");
  auto* counts = static_cast<const uint64_t*>(matrix);
  uint32_t ranks = group->ranks();
  Layout source = Layout::even(from, from_type, ranks, 0);
  Layout target = Layout::even(to, to_type, ranks, 0);
  uint64_t sent = 0;
  uint64_t received = 0;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    source.offsets[rank] = sent;
    target.offsets[rank] = received;
    sent += source.counts[rank] = counts[group->rank() * ranks + rank];
    received += target.counts[rank] = counts[rank * ranks + group->rank()];
  }
  return all_to_all_call(__func__, group, source, target, stream);
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  HCCL_FIND(group, comm);
  return launch(__func__, group, stream, {}, [](Communicator& ranks) { barrier(ranks); });
}

HcclResult HcclSend(void* buffer, uint64_t count, HcclDataType type, uint32_t to, HcclComm comm,
                    aclrtStream stream) {
  HCCL_FIND(group, comm);
  HCCL_SKIP_EMPTY(count);
  HcclSendRecvItem item = {HCCL_SEND, buffer, count, type, to};
  return transfer(__func__, group, &item, 1, stream);
}

HcclResult HcclRecv(void* buffer, uint64_t count, HcclDataType type, uint32_t from, HcclComm comm,
                    aclrtStream stream) {
  HCCL_FIND(group, comm);
  HCCL_SKIP_EMPTY(count);
  HcclSendRecvItem item = {HCCL_RECV, buffer, count, type, from};
  return transfer(__func__, group, &item, 1, stream);
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm,
                             aclrtStream stream) {
  HCCL_FIND(group, comm);
  if (items == nullptr) return refuse(HCCL_E_PTR, __func__, "null items");
  return transfer(__func__, group, items, count, stream);
}

HcclResult HcclGroupStart() {
  HCCL_CALL();
  ++t_depth;
  return HCCL_SUCCESS;
}

// Starts the collected calls of the group, all items of a communicator and stream at once.
HcclResult HcclGroupEnd() {
  HCCL_CALL();
  if (t_depth == 0) return refuse(HCCL_E_PARA, __func__, "no group was started");
  if (--t_depth > 0) return HCCL_SUCCESS;
  std::vector<Batch> merged;
  for (Batch& batch : t_batches) {
    bool same = !merged.empty() && merged.back().group == batch.group &&
                merged.back().stream == batch.stream;
    if (!same) merged.push_back({batch.group, batch.stream, {}});
    auto& items = merged.back().items;
    items.insert(items.end(), batch.items.begin(), batch.items.end());
  }
  t_batches.clear();
  for (const Batch& batch : merged) {
    auto count = static_cast<uint32_t>(batch.items.size());
    HcclResult error = transfer(__func__, batch.group, batch.items.data(), count, batch.stream);
    if (error != HCCL_SUCCESS) return error;
  }
  return HCCL_SUCCESS;
}

}  // extern "C"
