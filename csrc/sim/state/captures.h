// SPDX-License-Identifier: Apache-2.0
//
// Streams that capture graphs, and what is refused meanwhile.
#pragma once

#include <acl/acl_rt.h>

#include <memory>

#include "error.h"
#include "state/context.h"
#include "state/graph.h"
#include "state/work.h"

namespace sim {

// The capture that the event was recorded in and that goes on, null: none.
std::shared_ptr<Graph> capture_of(Event& event, std::shared_ptr<CapturedRecord>* record = nullptr);

// Of this thread, what the copies that wait are checked against.
aclmdlRICaptureMode& exchanged_capture_mode();

// For streams that would capture.
aclError refuse_flags(const char* call, const Stream& stream);

// For calls that wait for the stream, the device or the event, or ask for their state.
aclError refuse_captured(const char* call, const Stream& stream);
aclError refuse_captured(const char* call, const Context& context);
aclError refuse_captured(const char* call, Event& event);

// For copies and fills that wait. What is refused spoils the captures that forbid it.
aclError refuse_waiting_copy(const char* call, const Context& context,
                             aclError code = ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);

// For work of a default stream.
aclError refuse_implicit(const char* call, const Stream& stream);

// For work that is no kernel, of a stream that exchanges kernels of a task group.
aclError refuse_updating(const char* call, const Stream& stream);

// Whether the stream leaves its work to a graph. `keep` does so, or says that it does not.
bool keeps_work(const Stream& stream);
aclError keep(const char* call, Stream& stream, Work* work, bool* is_kept);

}  // namespace sim
