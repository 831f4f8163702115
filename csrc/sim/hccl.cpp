// SPDX-License-Identifier: Apache-2.0
//
// Collective communication. Communicators of one rank work; larger ones are refused.
#include "third_party/hccl/inc/hccl/hccl.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "control.h"
#include "handles.h"

#define HCCL_CALL() \
  if (int refused = npuSimEnterCall(__func__)) return static_cast<HcclResult>(refused)

namespace {

struct Communicator {
  std::string name;
  void* buffers[2] = {};

  ~Communicator() {
    for (void* buffer : buffers) {
      if (buffer != nullptr) npuSimFree(buffer);
    }
  }
};

sim::Handles<Communicator>& communicators() {
  static auto* once = new sim::Handles<Communicator>(0x55);
  return *once;
}

HcclResult refuse(HcclResult code, const char* call, const char* reason) {
  char message[256];
  std::snprintf(message, sizeof(message), "%s: %s", call, reason);
  npuSimFail(code, message);
  return code;
}

size_t size_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0:
      return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    case HCCL_DATA_TYPE_INT128:
      return 16;
    default:
      return 0;
  }
}

HcclResult create(const char* call, uint32_t ranks, uint32_t rank, const char* name,
                  HcclComm* result) {
  if (result == nullptr) return refuse(HCCL_E_PTR, call, "null communicator");
  if (rank >= ranks) return refuse(HCCL_E_PARA, call, "the rank is not below the rank count");
  if (ranks > 1) {
    return refuse(HCCL_E_NOT_SUPPORT, call,
                  "communicators of more than one rank are not simulated yet");
  }
  auto communicator = std::make_shared<Communicator>();
  communicator->name = name != nullptr && *name != '\0' ? name : "npu-sim-group";
  size_t bytes = npuSimCommunicatorBufferBytes();
  for (void*& buffer : communicator->buffers) {
    if (bytes > 0 && npuSimAllocate(&buffer, bytes) != ACL_SUCCESS) return HCCL_E_OOM;
  }
  *result = communicators().add(communicator);
  return HCCL_SUCCESS;
}

HcclResult check(const char* call, HcclComm comm) {
  bool known = communicators().find(comm) != nullptr;
  return known ? HCCL_SUCCESS : refuse(HCCL_E_PARA, call, "not a communicator, or destroyed");
}

// What every collective of one rank comes to: the own data arrives.
HcclResult pass(const char* call, const void* from, void* to, uint64_t count, HcclDataType type,
                HcclComm comm, aclrtStream stream) {
  if (HcclResult error = check(call, comm)) return error;
  if (size_of(type) == 0) return refuse(HCCL_E_NOT_SUPPORT, call, "unknown data type");
  if (count == 0 || from == to) return HCCL_SUCCESS;
  if (from == nullptr || to == nullptr) return refuse(HCCL_E_PTR, call, "null buffer");
  aclError error = npuSimCopyAsync(to, from, count * size_of(type), stream);
  return error == ACL_SUCCESS ? HCCL_SUCCESS : HCCL_E_RUNTIME;
}

HcclResult check_root(const char* call, uint32_t root) {
  return root == 0 ? HCCL_SUCCESS : refuse(HCCL_E_PARA, call, "the root is not a rank");
}

HcclResult refuse_peer(const char* call, HcclComm comm) {
  if (HcclResult error = check(call, comm)) return error;
  return refuse(HCCL_E_PARA, call, "a communicator of one rank has no peer");
}

const char* offset(const void* buffer, const void* displacements, HcclDataType type) {
  return static_cast<const char*>(buffer) +
         static_cast<const uint64_t*>(displacements)[0] * size_of(type);
}

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  HCCL_CALL();
  if (info == nullptr) return refuse(HCCL_E_PTR, __func__, "null root info");
  std::memset(info, 0, sizeof(*info));
  std::strcpy(info->internal, "npu-sim");
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                HcclComm* comm) {
  HCCL_CALL();
  if (info == nullptr) return refuse(HCCL_E_PTR, __func__, "null root info");
  return create("HcclCommInitRootInfo", ranks, rank, nullptr, comm);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm) {
  HCCL_CALL();
  if (info == nullptr || config == nullptr) return refuse(HCCL_E_PTR, __func__, "null argument");
  return create("HcclCommInitRootInfoConfig", ranks, rank, config->hcclCommName, comm);
}

HcclResult HcclCommInitAll(uint32_t count, int32_t* devices, HcclComm* comms) {
  HCCL_CALL();
  if (devices == nullptr) return refuse(HCCL_E_PTR, __func__, "null devices");
  return create("HcclCommInitAll", count, 0, nullptr, comms);
}

HcclResult HcclCreateSubCommConfig(HcclComm* comm, uint32_t ranks, uint32_t* ids, uint64_t,
                                   uint32_t rank, HcclCommConfig* config, HcclComm* sub) {
  HCCL_CALL();
  if (comm == nullptr || ids == nullptr) return refuse(HCCL_E_PTR, __func__, "null argument");
  if (HcclResult error = check(__func__, *comm)) return error;
  return create("HcclCreateSubCommConfig", ranks, rank,
                config == nullptr ? nullptr : config->hcclCommName, sub);
}

HcclResult HcclCommDestroy(HcclComm comm) {
  HCCL_CALL();
  if (HcclResult error = check(__func__, comm)) return error;
  communicators().remove(comm);
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* ranks) {
  HCCL_CALL();
  if (HcclResult error = check(__func__, comm)) return error;
  *ranks = 1;
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  HCCL_CALL();
  if (HcclResult error = check(__func__, comm)) return error;
  *rank = 0;
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  HCCL_CALL();
  if (HcclResult error = check(__func__, comm)) return error;
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", communicators().find(comm)->name.c_str());
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
  HCCL_CALL();
  *error = HCCL_SUCCESS;
  return check(__func__, comm);
}

uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) {
  HCCL_CALL();
  return HCCL_SUCCESS;
}

HcclResult HcclGetConfig(HcclConfig, HcclConfigValue* value) {
  HCCL_CALL();
  value->value = 0;
  return HCCL_SUCCESS;
}

HcclResult HcclAllReduce(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp,
                         HcclComm comm, aclrtStream stream) {
  HCCL_CALL();
  return pass("HcclAllReduce", from, to, count, type, comm, stream);
}

HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root,
                         HcclComm comm, aclrtStream stream) {
  HCCL_CALL();
  if (HcclResult error = check_root(__func__, root)) return error;
  return pass("HcclBroadcast", buffer, buffer, count, type, comm, stream);
}

HcclResult HcclReduceScatter(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp,
                             HcclComm comm, aclrtStream stream) {
  HCCL_CALL();
  return pass("HcclReduceScatter", from, to, count, type, comm, stream);
}

HcclResult HcclScatter(void* from, void* to, uint64_t count, HcclDataType type, uint32_t root,
                       HcclComm comm, aclrtStream stream) {
  HCCL_CALL();
  if (HcclResult error = check_root(__func__, root)) return error;
  return pass("HcclScatter", from, to, count, type, comm, stream);
}

HcclResult HcclAllGather(void* from, void* to, uint64_t count, HcclDataType type, HcclComm comm,
                         aclrtStream stream) {
  HCCL_CALL();
  return pass("HcclAllGather", from, to, count, type, comm, stream);
}

HcclResult HcclReduce(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp,
                      uint32_t root, HcclComm comm, aclrtStream stream) {
  HCCL_CALL();
  if (HcclResult error = check_root(__func__, root)) return error;
  return pass("HcclReduce", from, to, count, type, comm, stream);
}

HcclResult HcclAlltoAll(const void* from, uint64_t count, HcclDataType type, const void* to,
                        uint64_t, HcclDataType, HcclComm comm, aclrtStream stream) {
  HCCL_CALL();
  return pass("HcclAlltoAll", from, const_cast<void*>(to), count, type, comm, stream);
}

HcclResult HcclAlltoAllV(const void* from, const void* counts, const void* from_offsets,
                         HcclDataType from_type, const void* to, const void*,
                         const void* to_offsets, HcclDataType to_type, HcclComm comm,
                         aclrtStream stream) {
  HCCL_CALL();
  return pass("HcclAlltoAllV", offset(from, from_offsets, from_type),
              const_cast<char*>(offset(to, to_offsets, to_type)),
              static_cast<const uint64_t*>(counts)[0], from_type, comm, stream);
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream) {
  HCCL_CALL();
  return check(__func__, comm);
}

HcclResult HcclSend(void*, uint64_t, HcclDataType, uint32_t, HcclComm comm, aclrtStream) {
  HCCL_CALL();
  return refuse_peer("HcclSend", comm);
}

HcclResult HcclRecv(void*, uint64_t, HcclDataType, uint32_t, HcclComm comm, aclrtStream) {
  HCCL_CALL();
  return refuse_peer("HcclRecv", comm);
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem*, uint32_t, HcclComm comm, aclrtStream) {
  HCCL_CALL();
  return refuse_peer("HcclBatchSendRecv", comm);
}

HcclResult HcclGroupStart() {
  HCCL_CALL();
  return HCCL_SUCCESS;
}

HcclResult HcclGroupEnd() {
  HCCL_CALL();
  return HCCL_SUCCESS;
}

const char* HcclGetErrorString(HcclResult code) {
  switch (code) {
    case HCCL_SUCCESS:
      return "no error";
    case HCCL_E_PARA:
      return "parameter error";
    case HCCL_E_PTR:
      return "empty pointer";
    case HCCL_E_NOT_SUPPORT:
      return "feature not supported";
    case HCCL_E_OOM:
      return "out of memory";
    case HCCL_E_RUNTIME:
      return "runtime error";
    default:
      return "unknown error";
  }
}

}  // extern "C"
