// SPDX-License-Identifier: Apache-2.0
//
// Graphs, the streams that capture them, and what is refused meanwhile.
#pragma once

#include <acl/acl_rt.h>

#include <atomic>
#include <thread>

#include "context.h"
#include "error.h"
#include "handles.h"

namespace sim {

// Behind an aclmdlRI. It takes one more stream of the device for as long as it lives.
struct Graph {
  Context* const context;
  const aclmdlRICaptureMode mode;
  const bool is_waited_for;  // its stream is, when the device is synchronised
  const std::thread::id thread = std::this_thread::get_id();  // that began the capture
  aclmdlRI handle = nullptr;
  std::atomic<aclmdlRICaptureStatus> status{ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE};  // NONE: ended

  Graph(const Stream& stream, aclmdlRICaptureMode mode);  // with the stream of the device taken
  ~Graph();

  bool is_captured() const { return status != ACL_MODEL_RI_CAPTURE_STATUS_NONE; }
  void spoil();  // the end of the capture will tell
};

Handles<Graph>& graphs();
void drop_graphs(const Context& context);

// Of this thread, what the copies that wait are checked against.
aclmdlRICaptureMode& exchanged_capture_mode();

// For calls that wait for the stream, the device or the event, or ask for their state.
aclError refuse_captured(const char* call, const Stream& stream);
aclError refuse_captured(const char* call, const Context& context);
aclError refuse_captured(const char* call, Event& event);

// For copies and fills that wait. What is refused spoils the captures that forbid it.
aclError refuse_waiting_copy(const char* call, const Context& context,
                             aclError code = ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);

// For a stream that waits for an event of a capture, and so would join it.
aclError refuse_joining(const char* call, const Stream& stream);

// For work of the stream. A capture would record it, which is not simulated: it is spoiled.
aclError refuse_recording(const char* call, const Stream& stream);

}  // namespace sim
