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
  const char* soc_name;          // as in aclrtGetSocName
  size_t streams;                // of a device, for all processes together
  size_t context_streams;        // used by each context
  bool has_1g_pages;             // of memory
  bool has_1g_pages_for_others;  // of memory that other devices access
  bool has_hbm;                  // otherwise its memory is DDR
};

// The settings of the simulated machine from the environment, read once.
struct Settings {
  std::vector<int> visible;     // physical device of each visible device
  size_t hbm_bytes;             // of every device
  Chip chip;                    // of every device
  size_t streams;               // of every device, for all processes together
  double link_bytes_per_ns;     // in each direction; 0 if not throttled
  int64_t hccl_buffer_bytes;    // of each of a communicator's two buffers; negative for HCCL's size
  std::string state_directory;  // shared by all processes of the simulated machine
  Version kernel;               // of the host
  Version driver;
};

const Settings& settings();

// Whether this machine's chip has the function.
bool chip_supports(const std::string& call);

constexpr int kMaxDevices = 16;
constexpr const char* kKernel = "5.10";  // the default of NPU_SIM_KERNEL
constexpr size_t kKiB = size_t{1} << 10;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kGiB = size_t{1} << 30;

}  // namespace sim
