// SPDX-License-Identifier: Apache-2.0
//
// The compiler of CANN operators. Nothing is compiled: the few operators that the framework runs
// without its dispatcher are implemented here.
#include <acl/acl_op_compiler.h>

#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ascendcl/tensor.h"
#include "control.h"
#include "operators/tiles.h"

struct aclopAttr {};
struct aclGraphDumpOption {};

namespace {

struct Options {
  std::mutex mutex;
  std::map<aclCompileOpt, std::string> values = {{ACL_PRECISION_MODE, "allow_fp32_to_fp16"},
                                                 {ACL_OP_JIT_COMPILE, "disable"}};

  const std::string& get(aclCompileOpt option) {
    std::string& value = values[option];
    if (value.empty()) value = "0";
    return value;
  }
};

Options& options() {
  static Options* once = new Options;
  return *once;
}

aclError refuse(const std::string& message) {
  return npuSimFail(ACL_ERROR_OP_NOT_FOUND, message.c_str());
}

struct Tensor {
  aclTensorDesc description;
  char* data;
  size_t bytes;

  const std::vector<int64_t>& sizes() const { return description.sizes; }

  bool is_tiled() const { return description.storage_format == ACL_FORMAT_FRACTAL_NZ; }

  // For a tiled tensor; empty if its buffer does not have the described size.
  std::optional<sim::Tiling> tiling() const {
    size_t elements = 1;
    for (int64_t size : description.storage_sizes) elements *= static_cast<size_t>(size);
    if (elements == 0 || bytes % elements != 0) return std::nullopt;
    return sim::Tiling::of(description.sizes, description.storage_sizes, bytes / elements);
  }

  std::vector<int64_t> integers() const {
    bool is_wide = description.type == ACL_INT64;
    std::vector<int64_t> values(bytes / (is_wide ? 8 : 4));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = is_wide ? reinterpret_cast<const int64_t*>(data)[i]
                          : reinterpret_cast<const int32_t*>(data)[i];
    }
    return values;
  }
};

void fill_with(const Tensor& out, const Tensor& value) {
  for (size_t at = 0; at + value.bytes <= out.bytes; at += value.bytes) {
    std::memcpy(out.data + at, value.data, value.bytes);
  }
}

// Copies each element of `in` to a position in `out` that is shifted by `before`.
void place(const Tensor& in, const Tensor& out, const std::vector<int64_t>& before) {
  std::vector<int64_t> in_sizes = in.sizes();
  std::vector<int64_t> out_sizes = out.sizes();
  size_t row = in_sizes.empty() ? 1 : static_cast<size_t>(in_sizes.back());
  size_t elements = 1;
  for (int64_t size : in_sizes) elements *= static_cast<size_t>(size);
  if (elements == 0) return;
  size_t unit = in.bytes / elements;
  for (size_t element = 0; element < elements; element += row) {
    size_t rest = element;
    size_t target = 0;
    size_t stride = 1;
    for (size_t d = in_sizes.size(); d-- > 0;) {
      size_t index = rest % static_cast<size_t>(in_sizes[d]);
      rest /= static_cast<size_t>(in_sizes[d]);
      target += (index + static_cast<size_t>(before[d])) * stride;
      stride *= static_cast<size_t>(out_sizes[d]);
    }
    std::memcpy(out.data + target * unit, in.data + element * unit, row * unit);
  }
}

using Tensors = std::vector<Tensor>;

// sizes (known from the output), value
aclError fill(const Tensors& inputs, const Tensors& outputs) {
  fill_with(outputs[0], inputs[1]);
  return ACL_SUCCESS;
}

// tensor, (before, after) of each dimension, value
aclError pad(const Tensors& inputs, const Tensors& outputs) {
  std::vector<int64_t> paddings = inputs[1].integers();
  std::vector<int64_t> before;
  for (size_t i = 0; i < paddings.size(); i += 2) before.push_back(paddings[i]);
  if (before.size() != inputs[0].sizes().size()) return refuse("PadV3: paddings do not fit");
  fill_with(outputs[0], inputs[2]);
  place(inputs[0], outputs[0], before);
  return ACL_SUCCESS;
}

// Copies the tensor, and converts it to the output's storage format. Different sizes, as those of a
// view may be, are not noticed.
aclError identity(const Tensors& inputs, const Tensors& outputs) {
  const Tensor &in = inputs[0], &out = outputs[0];
  const bool from_tiles = in.is_tiled(), to_tiles = out.is_tiled();
  if (from_tiles == to_tiles) {
    if (in.bytes > out.bytes) return refuse("Identity: the output is smaller than the input");
    std::memcpy(out.data, in.data, in.bytes);
    return ACL_SUCCESS;
  }
  const Tensor &tiled = from_tiles ? in : out, &plain = from_tiles ? out : in;
  std::optional<sim::Tiling> tiling = tiled.tiling();
  if (!tiling.has_value() || tiled.sizes() != plain.sizes() || plain.bytes < tiling->bytes()) {
    return refuse("Identity: a tensor of " + std::to_string(plain.bytes) + " bytes and one of " +
                  std::to_string(tiled.bytes) + " in tiles do not fit");
  }
  if (from_tiles) {
    tiling->untile(in.data, out.data);
  } else {
    tiling->tile(in.data, out.data);
  }
  return ACL_SUCCESS;
}

struct Operator {
  size_t inputs;
  size_t outputs;
  aclError (*run)(const Tensors& inputs, const Tensors& outputs);
};

const std::map<std::string, Operator>& operators() {
  static const auto* once = new std::map<std::string, Operator>{
      {"Fill", {2, 1, fill}},
      {"Identity", {1, 1, identity}},
      {"PadV3", {3, 1, pad}},
  };
  return *once;
}

template <typename Buffer>
Tensors tensors(int count, const aclTensorDesc* const* descriptions, Buffer* const* buffers) {
  Tensors tensors;
  for (int i = 0; i < count; ++i) {
    tensors.push_back({*descriptions[i], static_cast<char*>(aclGetDataBufferAddr(buffers[i])),
                       aclGetDataBufferSizeV2(buffers[i])});
  }
  return tensors;
}

}  // namespace

extern "C" {

aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
  std::lock_guard<std::mutex> lock(options().mutex);
  options().values[option] = value;
  return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt option) {
  std::lock_guard<std::mutex> lock(options().mutex);
  return options().get(option).size() + 1;
}

aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t length) {
  std::lock_guard<std::mutex> lock(options().mutex);
  const std::string& text = options().get(option);
  if (length < text.size() + 1) return ACL_ERROR_INVALID_PARAM;
  std::strcpy(value, text.c_str());
  return ACL_SUCCESS;
}

aclError aclopSetCompileFlag(aclOpCompileFlag) { return ACL_SUCCESS; }

aclError aclopCompileAndExecute(const char* type, int input_count,
                                const aclTensorDesc* const* input_descriptions,
                                const aclDataBuffer* const* inputs, int output_count,
                                const aclTensorDesc* const* output_descriptions,
                                aclDataBuffer* const* outputs, const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream stream) {
  auto found = operators().find(type);
  if (found == operators().end()) {
    return refuse(std::string("the simulated device has no CANN operator ") + type);
  }
  Tensors from = tensors(input_count, input_descriptions, inputs);
  Tensors to = tensors(output_count, output_descriptions, outputs);
  if (from.size() != found->second.inputs || to.size() != found->second.outputs) {
    return refuse(std::string(type) + ": wrong number of tensors");
  }
  if (aclError error = npuSimDrain(stream)) return error;
  return found->second.run(from, to);
}

aclGraphDumpOption* aclCreateGraphDumpOpt() { return new aclGraphDumpOption; }
aclError aclDestroyGraphDumpOpt(const aclGraphDumpOption* option) {
  delete option;
  return ACL_SUCCESS;
}

NPU_SIM_EXPORT aclopAttr* aclopCreateAttr() { return new aclopAttr; }
NPU_SIM_EXPORT void aclopDestroyAttr(const aclopAttr* attributes) { delete attributes; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const*) {
  return ACL_SUCCESS;
}

}  // extern "C"
