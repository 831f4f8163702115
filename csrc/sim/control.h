// SPDX-License-Identifier: Apache-2.0
//
// Functions for tests and for the simulator's other libraries, besides AscendCL.
#pragma once

#include <acl/acl_rt.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NPU_SIM_EXPORT __attribute__((visibility("default")))

// What this process holds on all devices together.
typedef struct {
  uint64_t deviceBytes;      // physical memory of the devices
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

// Sets rules as in NPU_SIM_FAULTS; calls are counted from now on. Not 0 if the rules are invalid.
NPU_SIM_EXPORT int npuSimSetFaults(const char* rules);

// The number of calls that the rules have hit since they were set.
NPU_SIM_EXPORT uint64_t npuSimFaultHits(void);

NPU_SIM_EXPORT uint64_t npuSimCallCount(const char* name);
NPU_SIM_EXPORT void npuSimResetCounters(void);

// The names of calls in order, one per line, since the log was last turned on. Returns the length
// of the whole log; at most `room` bytes including a final zero are written.
NPU_SIM_EXPORT void npuSimKeepCallLog(int on);
NPU_SIM_EXPORT size_t npuSimCallLog(char* log, size_t room);

// Waits until a stream of any context is idle; refused while it captures. Neither counted nor
// subject to fault rules.
NPU_SIM_EXPORT aclError npuSimDrain(aclrtStream stream);

// Counts a call of a simulated library by its name. Returns the code that it must return at once,
// or 0.
NPU_SIM_EXPORT int npuSimEnterCall(const char* name);

// Stores the message for aclGetRecentErrMsg and returns the code.
NPU_SIM_EXPORT int npuSimFail(int code, const char* message);

// Device memory and work of the simulated libraries, in the current context. Neither counted as
// calls nor subject to fault rules; the memory counts as the device's.
NPU_SIM_EXPORT aclError npuSimAllocate(void** pointer, size_t bytes);
NPU_SIM_EXPORT aclError npuSimFree(void* pointer);

typedef struct {
  const void* begin;
  size_t bytes;
} npuSimRange;

// Work that a simulated library gives to a stream.
typedef struct {
  const char* name;
  void* argument;
  // Runs in the order of the stream, and at each execution of a graph that contains it. If it
  // returns a code other than 0, the context has failed: every later call that waits for its device
  // returns that code with the function's recent message.
  int (*run)(void* argument);
  // Called each time that it is given to a stream, unless null. Work with this function does not
  // run on the device's cores, and cannot be part of a task group.
  void (*launched)(void* argument);
  // Called instead of `run` if the device refuses to execute the graph, unless null.
  void (*skip)(void* argument);
  void (*release)(void* argument);  // called when it will not run any more, unless null
} npuSimKernel;

// Appends the kernel to the stream, or to the graph that the stream captures. The ranges must be
// mapped device memory, and count as in use until it has returned. The argument is released even if
// this fails.
NPU_SIM_EXPORT aclError npuSimLaunch(aclrtStream stream, const npuSimKernel* kernel,
                                     const npuSimRange* ranges, size_t count);

// 1 if a stream of any context adds its work to a graph.
NPU_SIM_EXPORT int npuSimKeepsWork(aclrtStream stream);

// Called around every wait inside AscendCL: `begin` releases what the thread holds, such as the
// GIL, and `end` acquires it again.
typedef struct {
  void* (*begin)(void);
  void (*end)(void* held);
} npuSimWaitHooks;
NPU_SIM_EXPORT void npuSimSetWaitHooks(const npuSimWaitHooks* hooks);  // never freed

// Aborts the process like a device fault.
NPU_SIM_EXPORT void npuSimFault(const char* message);

// A key of the current device, unique among all devices of all simulated machines; 0 if there is
// none.
NPU_SIM_EXPORT uint64_t npuSimDeviceKey(void);

// The costs of operators on the device since the counters were last reset.
typedef struct {
  uint64_t launches;         // operators; each is also counted by its name
  uint64_t onAiCpu;          // the ones that a 910B runs on its AI CPU
  uint64_t hiddenCopyBytes;  // copied to make arguments contiguous, and back
  uint64_t waits;            // calls of aclrtSynchronize*: of a stream, an event or a device
} npuSimCosts;

NPU_SIM_EXPORT void npuSimGetCosts(npuSimCosts* costs);

// An operator's counter, one per name. It is never freed.
typedef struct npuSimOperator npuSimOperator;
NPU_SIM_EXPORT npuSimOperator* npuSimFindOperator(const char* name);

// Called around an operator's kernel. Not 0 if no other operator's kernel runs in this thread, so
// that this launch counts.
NPU_SIM_EXPORT int npuSimEnterKernel(void);
NPU_SIM_EXPORT void npuSimLeaveKernel(void);

// The code with which the launch must fail, or 0.
NPU_SIM_EXPORT int npuSimCountLaunch(npuSimOperator* op, int on_ai_cpu, uint64_t hidden_copy_bytes);

// The size of a communicator's buffer: NPU_SIM_HCCL_BUFFER_MIB if it is set, else `bytes`.
NPU_SIM_EXPORT size_t npuSimCommunicatorBufferBytes(size_t bytes);

#ifdef __cplusplus
}
#endif
