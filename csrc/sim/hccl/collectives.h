// SPDX-License-Identifier: Apache-2.0
//
// A rank's part in each collective. All run on a stream's thread and throw Failure.
#pragma once

#include <vector>

#include "hccl/communicator.h"

namespace sim::hccl {

// The number of elements from or to each rank, and where they are.
struct Layout {
  char* base;
  HcclDataType type;
  std::vector<uint64_t> counts;
  std::vector<uint64_t> offsets;  // elements

  static Layout even(const void* base, HcclDataType type, uint32_t ranks, uint64_t count);
  static Layout given(const void* base, HcclDataType type, uint32_t ranks, const void* counts,
                      const void* offsets);

  char* at(uint32_t rank) const;
  size_t bytes(uint32_t rank) const;
  npuSimRange range() const;
};

void all_reduce(Communicator& group, const void* from, void* to, uint64_t count, HcclDataType type,
                HcclReduceOp operation);
void reduce_scatter(Communicator& group, const Layout& from, void* to, HcclReduceOp operation);
void reduce_to(Communicator& group, const void* from, void* to, uint64_t count, HcclDataType type,
               HcclReduceOp operation, uint32_t root);
void all_gather(Communicator& group, const void* from, const Layout& to);
void broadcast(Communicator& group, void* buffer, uint64_t count, HcclDataType type, uint32_t root);
void scatter(Communicator& group, const Layout& from, void* to, uint32_t root);
void all_to_all(Communicator& group, const Layout& from, const Layout& to);
void barrier(Communicator& group);
void send_and_receive(Communicator& group, const std::vector<HcclSendRecvItem>& items);

}  // namespace sim::hccl
