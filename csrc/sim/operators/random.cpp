// SPDX-License-Identifier: Apache-2.0
#include <ATen/CPUGeneratorImpl.h>
#include <torch_npu/csrc/aten/NPUGeneratorImpl.h>

#include <mutex>

#include "operators/operators.h"

namespace sim::operators {

// The device's generator is a seed and an offset. Every call draws from a CPU generator seeded with
// both and advances the offset, so results are reproducible from seeds and saved states. A graph
// finds both in device memory, where the framework stores them before each execution.
GeneratorForCall generator_for_call(std::optional<at::Generator> generator, c10::Device device) {
  constexpr uint64_t kAdvance = 4;  // the minimum of the framework's own kernels
  at::Generator source =
      generator.has_value() ? *generator : at::globalContext().defaultGenerator(device);
  auto seeded = [](uint64_t seed, uint64_t offset) {
    return at::make_generator<at::CPUGeneratorImpl>(seed + offset * 0x9e3779b97f4a7c15u);
  };
  std::lock_guard<std::mutex> lock(source.mutex());
  at_npu::PhiloxNpuState state = source.get<at_npu::NPUGeneratorImpl>()->philox_npu_state(kAdvance);
  if (!state.captured_) {
    return {[=] { return seeded(state.seed_.val, state.offset_.val); }, {}};
  }
  auto* seed = static_cast<const uint64_t*>(state.seed_.ptr->const_data_ptr());
  auto* offset = static_cast<const uint64_t*>(state.offset_.ptr->const_data_ptr());
  return {[=] { return seeded(*seed, *offset + state.offset_intragraph_); },
          {{seed, sizeof(*seed)}, {offset, sizeof(*offset)}}};
}

}  // namespace sim::operators
