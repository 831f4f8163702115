// SPDX-License-Identifier: Apache-2.0
#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "operators.h"

namespace sim::operators {

// The device's generator is a seed and an offset. Every call draws from a CPU generator seeded
// with both and advances the offset, so seeds, saved states and restored states all repeat.
at::Generator generator_for_call(std::optional<at::Generator> generator, c10::Device device) {
  constexpr uint64_t kAdvance = 4;  // what the framework's own kernels use up at least
  at::Generator source =
      generator.has_value() ? *generator : at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(source.mutex());
  uint64_t offset = source.get_offset();
  source.set_offset(offset + kAdvance);
  uint64_t mixed = source.current_seed() + offset * 0x9e3779b97f4a7c15u;
  return at::make_generator<at::CPUGeneratorImpl>(mixed);
}

}  // namespace sim::operators
