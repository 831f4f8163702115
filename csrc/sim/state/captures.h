// SPDX-License-Identifier: Apache-2.0
//
// Streams that capture graphs, and what is refused during a capture.
#pragma once

#include <acl/acl_rt.h>

#include <memory>

#include "error.h"
#include "state/context.h"
#include "state/graph.h"
#include "state/work.h"

namespace sim {

// The running capture in which the event was recorded, or null.
std::shared_ptr<Graph> capture_of(Event& event, std::shared_ptr<CapturedRecord>* record = nullptr);

// This thread's mode, against which copies that wait are checked.
aclmdlRICaptureMode& exchanged_capture_mode();

// Refuses streams whose flags do not allow a capture.
aclError refuse_flags(const char* call, const Stream& stream);

// Refuses calls that wait for or query the stream, the device or the event during a capture.
aclError refuse_captured(const char* call, const Stream& stream);
aclError refuse_captured(const char* call, const Context& context);
aclError refuse_captured(const char* call, Event& event);

// Refuses copies and fills that wait. A refused call invalidates the captures that forbid it.
aclError refuse_waiting_copy(const char* call, const Context& context,
                             aclError code = ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);

// Refuses work on a default stream.
aclError refuse_implicit(const char* call, const Stream& stream);

// Refuses work other than kernels on a stream that updates a task group.
aclError refuse_updating(const char* call, const Stream& stream);

// Whether the stream adds its work to a graph. `keep` adds it, or returns that it does not.
bool keeps_work(const Stream& stream);
aclError keep(const char* call, Stream& stream, Work* work, bool* is_kept);

}  // namespace sim
