// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sim {

struct Version {
  int major;
  int minor;
  bool at_least(const Version& other) const {
    return major != other.major ? major > other.major : minor >= other.minor;
  }
};

struct Chip {
  const char* name;              // in NPU_SIM_SOC
  const char* soc_name;          // as aclrtGetSocName tells it
  size_t streams;                // of a device, for all processes together
  size_t context_streams;        // that each context takes for itself
  bool has_1g_pages;             // of memory
  bool has_1g_pages_for_others;  // of memory that other devices reach
  bool has_hbm;                  // else its memory is DDR
};

// What the environment says about the simulated machine, read once.
struct Settings {
  std::vector<int> visible;     // physical device of each visible device
  size_t hbm_bytes;             // of every device
  Chip chip;                    // every device is one
  size_t streams;               // that every device has, for all processes together
  double link_bytes_per_ns;     // one direction, 0: not throttled
  int64_t hccl_buffer_bytes;    // of each of a communicator's two buffers, negative: as HCCL's
  std::string state_directory;  // shared by all processes of the simulated machine
  Version kernel;               // of the host
  Version driver;
};

const Settings& settings();

// Whether this machine's chip has the function.
bool chip_supports(const std::string& call);

constexpr int kMaxDevices = 16;
constexpr const char* kKernel = "5.10";  // unless NPU_SIM_KERNEL names another
constexpr size_t kKiB = size_t{1} << 10;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kGiB = size_t{1} << 30;

}  // namespace sim
