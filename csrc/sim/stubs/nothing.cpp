// SPDX-License-Identifier: Apache-2.0
//
// Libraries of CANN that the framework links and calls nothing of.
extern "C" __attribute__((visibility("default"))) int npuSimNothingHere() { return 0; }
