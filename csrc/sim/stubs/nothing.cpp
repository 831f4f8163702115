// SPDX-License-Identifier: Apache-2.0
//
// For CANN libraries that the framework links without calling them.
extern "C" __attribute__((visibility("default"))) int npuSimNothingHere() { return 0; }
