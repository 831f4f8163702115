// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sim::costs {

void reset();

}  // namespace sim::costs
