// SPDX-License-Identifier: Apache-2.0
//
// Collective communication: the calls that create, describe and destroy communicators. Those that
// move data are in hccl/calls.cpp.
#include "third_party/hccl/inc/hccl/hccl.h"

#include <cstdlib>
#include <cstring>

#include "hccl/calls.h"

using namespace sim::hccl;

namespace sim::hccl {

Handles<Communicator>& communicators() {
  static auto* once = new Handles<Communicator>(0x55);
  return *once;
}

HcclResult refuse(HcclResult code, const char* call, const std::string& reason) {
  npuSimFail(code, (std::string(call) + ": " + reason).c_str());
  return code;
}

}  // namespace sim::hccl

namespace {

constexpr char kRootMagic[8] = "npu-sim";
constexpr uint32_t kNoSubCommunicator = 0xFFFFFFFF;

struct RootInfo {
  char magic[8];
  uint64_t key;
  Address address;
};
static_assert(sizeof(RootInfo) <= sizeof(HcclRootInfo));

size_t number(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  size_t value = text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
  return value > 0 ? value : otherwise;
}

// From the configuration, else from the environment, else HCCL's documented default.
Options options_of(const HcclCommConfig* config, uint64_t key) {
  Options options;
  options.name = config == nullptr ? "" : config->hcclCommName;
  if (options.name.empty()) options.name = "npu-sim-" + std::to_string(key);
  size_t megabytes = number("HCCL_BUFFSIZE", HCCL_COMM_DEFAULT_BUFFSIZE);
  if (config != nullptr && config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET) {
    megabytes = config->hcclBufferSize;
  }
  options.buffer_bytes = npuSimCommunicatorBufferBytes(megabytes << 20);
  options.connect_timeout = std::chrono::seconds(number("HCCL_CONNECT_TIMEOUT", 120));
  options.execute_timeout = std::chrono::seconds(number("HCCL_EXEC_TIMEOUT", 1836));
  if (config != nullptr && config->hcclExecTimeOut > 0) {
    options.execute_timeout = std::chrono::seconds(config->hcclExecTimeOut);
  }
  return options;
}

template <typename Make>
HcclResult create(const char* call, uint32_t ranks, uint32_t rank, HcclComm* result, Make make) {
  if (result == nullptr) return refuse(HCCL_E_PTR, call, "null communicator");
  if (rank >= ranks) return refuse(HCCL_E_PARA, call, "the rank is not below the rank count");
  if (npuSimDeviceKey() == 0) return refuse(HCCL_E_RUNTIME, call, "this thread has no device");
  try {
    *result = communicators().add(make());
    return HCCL_SUCCESS;
  } catch (const Failure& failure) {
    return refuse(failure.code, call, failure.reason);
  }
}

HcclResult join(const char* call, uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                const HcclCommConfig* config, HcclComm* comm) {
  if (info == nullptr) return refuse(HCCL_E_PTR, call, "null root info");
  RootInfo root;
  std::memcpy(&root, info->internal, sizeof(root));
  if (std::memcmp(root.magic, kRootMagic, sizeof(kRootMagic)) != 0) {
    return refuse(HCCL_E_PARA, call, "not a root info of HcclGetRootInfo");
  }
  return create(call, ranks, rank, comm, [&] {
    return std::make_shared<Communicator>(root.key, ranks, rank, options_of(config, root.key),
                                          root.address);
  });
}

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  HCCL_CALL();
  if (info == nullptr) return refuse(HCCL_E_PTR, __func__, "null root info");
  std::memset(info, 0, sizeof(*info));
  RootInfo root = {{}, new_key(), own_address()};
  std::memcpy(root.magic, kRootMagic, sizeof(kRootMagic));
  std::memcpy(info->internal, &root, sizeof(root));
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                HcclComm* comm) {
  HCCL_CALL();
  return join(__func__, ranks, info, rank, nullptr, comm);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm) {
  HCCL_CALL();
  if (config == nullptr) return refuse(HCCL_E_PTR, __func__, "null configuration");
  return join(__func__, ranks, info, rank, config, comm);
}

HcclResult HcclCommInitAll(uint32_t count, int32_t* devices, HcclComm* comms) {
  HCCL_CALL();
  if (devices == nullptr) return refuse(HCCL_E_PTR, __func__, "null devices");
  if (count != 1) return refuse(HCCL_E_NOT_SUPPORT, __func__, "one process, one device");
  uint64_t key = new_key();
  return create(__func__, 1, 0, comms, [&] {
    return std::make_shared<Communicator>(key, 1, 0, options_of(nullptr, key), Address());
  });
}

HcclResult HcclCreateSubCommConfig(HcclComm* comm, uint32_t ranks, uint32_t* ids, uint64_t id,
                                   uint32_t rank, HcclCommConfig* config, HcclComm* sub) {
  HCCL_CALL();
  if (comm == nullptr || sub == nullptr) return refuse(HCCL_E_PTR, __func__, "null argument");
  auto parent = communicators().find(*comm);
  if (parent == nullptr) return refuse(HCCL_E_PARA, __func__, "not a communicator, or destroyed");
  if (ids == nullptr && id == kNoSubCommunicator) {  // a rank that has no part in it
    *sub = nullptr;
    return HCCL_SUCCESS;
  }
  if (ids == nullptr) return refuse(HCCL_E_PTR, __func__, "null ranks");
  std::vector<uint32_t> members(ids, ids + ranks);
  for (uint32_t member : members) {
    if (member >= parent->ranks()) return refuse(HCCL_E_PARA, __func__, "no such rank");
  }
  if (rank >= ranks || members[rank] != parent->rank()) {
    return refuse(HCCL_E_PARA, __func__, "this rank is not where the list of ranks has it");
  }
  return create(__func__, ranks, rank, sub, [&] {
    return std::make_shared<Communicator>(*parent, id, members, rank, options_of(config, id));
  });
}

HcclResult HcclCommDestroy(HcclComm comm) {
  HCCL_CALL();
  auto communicator = communicators().remove(comm);
  if (communicator == nullptr) {
    return refuse(HCCL_E_PARA, __func__, "not a communicator, or destroyed");
  }
  communicator->leave();
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t* ranks) {
  HCCL_FIND(group, comm);
  if (ranks == nullptr) return refuse(HCCL_E_PTR, __func__, "null result");
  *ranks = group->ranks();
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  HCCL_FIND(group, comm);
  if (rank == nullptr) return refuse(HCCL_E_PTR, __func__, "null result");
  *rank = group->rank();
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char* name) {
  HCCL_FIND(group, comm);
  if (name == nullptr) return refuse(HCCL_E_PTR, __func__, "null result");
  std::strncpy(name, group->name().c_str(), COMM_NAME_MAX_LENGTH - 1);
  name[COMM_NAME_MAX_LENGTH - 1] = '\0';
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
  HCCL_FIND(group, comm);
  if (error == nullptr) return refuse(HCCL_E_PTR, __func__, "null result");
  *error = group->state();
  return HCCL_SUCCESS;
}

HcclResult HcclCommSuspend(HcclComm comm) {
  HCCL_FIND(group, comm);
  group->suspend(true);
  return HCCL_SUCCESS;
}

HcclResult HcclCommResume(HcclComm comm) {
  HCCL_FIND(group, comm);
  group->suspend(false);
  return HCCL_SUCCESS;
}

uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) {
  HCCL_CALL();
  return HCCL_SUCCESS;
}

HcclResult HcclGetConfig(HcclConfig, HcclConfigValue* value) {
  HCCL_CALL();
  if (value == nullptr) return refuse(HCCL_E_PTR, __func__, "null result");
  value->value = 0;
  return HCCL_SUCCESS;
}

const char* HcclGetErrorString(HcclResult code) {
  static const char* const kTexts[] = {"no error",
                                       "parameter error",
                                       "empty pointer",
                                       "memory error",
                                       "internal error",
                                       "feature not supported",
                                       "resource not found",
                                       "resource unavailable",
                                       "system call error",
                                       "timeout",
                                       "cannot open file",
                                       "tcp connection failed",
                                       "roce connection failed",
                                       "tcp transfer failed",
                                       "roce transfer failed",
                                       "runtime error",
                                       "driver error",
                                       "profiling error",
                                       "cce error",
                                       "network error",
                                       "try again",
                                       "remote error",
                                       "suspending",
                                       "retry failed",
                                       "out of memory"};
  return code >= HCCL_SUCCESS && code <= HCCL_E_OOM ? kTexts[code] : "unknown error";
}

}  // extern "C"
