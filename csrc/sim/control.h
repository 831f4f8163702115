// SPDX-License-Identifier: Apache-2.0
//
// What the simulator offers to tests and to its own other libraries, beside AscendCL.
#pragma once

#include <acl/acl_rt.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NPU_SIM_EXPORT __attribute__((visibility("default")))

// Of this process, all devices together.
typedef struct {
  uint64_t deviceBytes;      // physical memory taken from the devices
  uint64_t physicalHandles;  // live handles of aclrtMallocPhysical
  uint64_t mappings;         // of aclrtMapMem
  uint64_t reservations;     // of aclrtReserveMemAddress
  uint64_t allocations;      // of aclrtMalloc
  uint64_t pinnedBytes;      // of aclrtMallocHost
  uint64_t registeredBytes;  // of aclrtHostRegister
  uint64_t streams;
  uint64_t events;
} npuSimCounters;

NPU_SIM_EXPORT void npuSimGetCounters(npuSimCounters* counters);

// Rules as in NPU_SIM_FAULTS, counted from now on. Not 0: not understood.
NPU_SIM_EXPORT int npuSimSetFaults(const char* rules);

// How many calls the rules have hit since they were set.
NPU_SIM_EXPORT uint64_t npuSimFaultHits(void);

NPU_SIM_EXPORT uint64_t npuSimCallCount(const char* name);
NPU_SIM_EXPORT void npuSimResetCounters(void);

// Names of calls in order, one a line, since the log was last turned on. Returns the length of the
// whole log; at most room bytes, with a final zero, are written.
NPU_SIM_EXPORT void npuSimKeepCallLog(int on);
NPU_SIM_EXPORT size_t npuSimCallLog(char* log, size_t room);

// Waits until the stream, of any context, is idle; refused while it captures. Neither counted nor
// failed on request.
NPU_SIM_EXPORT aclError npuSimDrain(aclrtStream stream);

// What a call of a simulated library must return at once, 0 to go on. Counted under the name.
NPU_SIM_EXPORT int npuSimEnterCall(const char* name);

// Keeps the message for aclGetRecentErrMsg and returns the code.
NPU_SIM_EXPORT int npuSimFail(int code, const char* message);

// Device memory and work of the simulated libraries themselves, on the current context. Not counted
// as calls and not failed on request; the memory counts as the device's.
NPU_SIM_EXPORT aclError npuSimAllocate(void** pointer, size_t bytes);
NPU_SIM_EXPORT aclError npuSimFree(void* pointer);

typedef struct {
  const void* begin;
  size_t bytes;
} npuSimRange;

// What a simulated library lets a stream do.
typedef struct {
  const char* name;
  void* argument;
  // Runs when its turn comes, again each time that a graph which keeps it is executed. If it
  // returns a code other than 0, the context has failed: from then on every call that waits for
  // its device returns that code, with the function's recent message.
  int (*run)(void* argument);
  // Each time that it is given to a stream; null: nothing to do. Work that has it is none of the
  // device's own cores, and no part of a task group.
  void (*launched)(void* argument);
  // Instead of running, where the device refuses to execute the graph; null: nothing to do.
  void (*skip)(void* argument);
  void (*release)(void* argument);  // when it will not run any more; null: nothing to do
} npuSimKernel;

// Runs the kernel on the stream, behind the work before it, or leaves it to the graph that the
// stream captures. The ranges must be mapped device memory and count as in use until it has
// returned. The argument is released also if this fails.
NPU_SIM_EXPORT aclError npuSimLaunch(aclrtStream stream, const npuSimKernel* kernel,
                                     const npuSimRange* ranges, size_t count);

// 1 if the stream, of any context, leaves its work to a graph.
NPU_SIM_EXPORT int npuSimKeepsWork(aclrtStream stream);

// Around whatever a call of AscendCL waits for: `begin` lets go of what its thread holds, and `end`
// takes it again.
typedef struct {
  void* (*begin)(void);
  void (*end)(void* held);
} npuSimWaitHooks;
NPU_SIM_EXPORT void npuSimSetWaitHooks(const npuSimWaitHooks* hooks);  // which stay there

// Ends the process as a fault of the device does.
NPU_SIM_EXPORT void npuSimFault(const char* message);

// Of the current device, unlike that of any other device of any simulated machine; 0: none.
NPU_SIM_EXPORT uint64_t npuSimDeviceKey(void);

// What operators of the device cost, since the counters were last reset.
typedef struct {
  uint64_t launches;         // operators, whoever's: each also counts under its name
  uint64_t onAiCpu;          // of them, those that a 910B runs on its AI CPU
  uint64_t hiddenCopyBytes;  // of arguments that were made contiguous, there and back
  uint64_t waits;            // calls of aclrtSynchronize*: of a stream, an event or a device
} npuSimCosts;

NPU_SIM_EXPORT void npuSimGetCosts(npuSimCosts* costs);

// An operator's counter, the same for the same name. It is never freed.
typedef struct npuSimOperator npuSimOperator;
NPU_SIM_EXPORT npuSimOperator* npuSimFindOperator(const char* name);

// Around the kernel of an operator. Not 0: no other operator's kernel runs in this thread, so that
// this launch is to be counted.
NPU_SIM_EXPORT int npuSimEnterKernel(void);
NPU_SIM_EXPORT void npuSimLeaveKernel(void);

// What the launch must fail with, 0 to go on.
NPU_SIM_EXPORT int npuSimCountLaunch(npuSimOperator* op, int on_ai_cpu, uint64_t hidden_copy_bytes);

// What a communicator's buffer of this size takes: NPU_SIM_HCCL_BUFFER_MIB if it is set.
NPU_SIM_EXPORT size_t npuSimCommunicatorBufferBytes(size_t bytes);

#ifdef __cplusplus
}
#endif
