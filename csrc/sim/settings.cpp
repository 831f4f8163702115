// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <sstream>

#include "error.h"

namespace sim {
namespace {

constexpr Chip kChips[] = {
    {"910B", "Ascend910B2", 1984, 1, true, false, true},
    {"910_93", "Ascend910_9391", 1984, 1, true, true, true},
    {"310P", "Ascend310P3", 1024, 2, false, false, false},
};

constexpr const char* kNotOn310P[] = {
    "aclrtHostGetDevicePointer",
    "aclrtHostRegister",
    "aclrtHostRegisterV2",
    "aclrtHostUnregister",
    "aclrtMemcpyBatch",
    "aclrtMemcpyBatchAsync",
    "aclrtValueWait",
    "aclrtValueWrite",
};

Chip chip() {
  const char* text = std::getenv("NPU_SIM_SOC");
  const std::string name = text != nullptr && *text != '\0' ? text : kChips[0].name;
  for (const Chip& known : kChips) {
    if (name == known.name) return known;
  }
  fault("NPU_SIM_SOC names no chip: '%s'", name.c_str());
}

double number(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  double value = std::strtod(text, &end);
  return *end == '\0' && value >= 0 ? value : otherwise;
}

// As in CANN, the list ends before the first entry that is not a device. A list that is not in
// ascending order, or contains a device twice, is empty.
std::vector<int> visible_devices(int count) {
  std::vector<int> visible;
  const char* text = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (text == nullptr) {
    for (int device = 0; device < count; ++device) visible.push_back(device);
    return visible;
  }
  std::stringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    char* end = nullptr;
    long device = std::strtol(entry.c_str(), &end, 10);
    bool is_number = end != entry.c_str() && *end == '\0';
    if (!is_number || device < 0 || device >= count) break;
    if (!visible.empty() && device <= visible.back()) return {};
    visible.push_back(static_cast<int>(device));
  }
  return visible;
}

std::string state_directory() {
  std::string base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  std::string name = base + "/npu-sim-" + std::to_string(getuid());
  const char* machine = std::getenv("NPU_SIM_MACHINE");
  return machine != nullptr && *machine != '\0' ? name + "-" + machine : name;
}

Version version(const char* name, const char* otherwise) {
  for (const char* text : {static_cast<const char*>(std::getenv(name)), otherwise}) {
    Version read;
    if (text != nullptr && std::sscanf(text, "%d.%d", &read.major, &read.minor) == 2) return read;
  }
  return {};
}

Settings read() {
  Settings read;
  int count = std::clamp(static_cast<int>(number("NPU_SIM_DEVICES", 1)), 0, kMaxDevices);
  read.visible = visible_devices(count);
  double hbm = number("NPU_SIM_HBM_GIB", 8) * static_cast<double>(kGiB);
  read.hbm_bytes = static_cast<size_t>(hbm) / (2 * kMiB) * (2 * kMiB);
  read.chip = chip();
  const auto streams = static_cast<double>(read.chip.streams);
  read.streams = static_cast<size_t>(number("NPU_SIM_STREAMS", streams));
  read.link_bytes_per_ns = number("NPU_SIM_LINK_GBPS", 0);
  double buffer = number("NPU_SIM_HCCL_BUFFER_MIB", -1) * static_cast<double>(kMiB);
  read.hccl_buffer_bytes = static_cast<int64_t>(buffer);
  read.state_directory = state_directory();
  read.kernel = version("NPU_SIM_KERNEL", kKernel);
  read.driver = version("NPU_SIM_DRIVER", "25.0");
  return read;
}

}  // namespace

const Settings& settings() {
  static const Settings* once = new Settings(read());
  return *once;
}

bool chip_supports(const std::string& call) {
  const bool refused_on_310p =
      std::find(std::begin(kNotOn310P), std::end(kNotOn310P), call) != std::end(kNotOn310P);
  return !refused_on_310p || std::string(settings().chip.name) != "310P";
}

}  // namespace sim
