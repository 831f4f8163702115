// SPDX-License-Identifier: Apache-2.0
#include "operators/cost.h"

#include <ATen/native/TypeProperties.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <algorithm>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#include "operators/operators.h"

namespace sim::operators {
namespace {

using at::ScalarType;
using c10::IValue;
using torch::jit::Stack;

constexpr Types bit(ScalarType type) { return Types{1} << static_cast<int>(type); }

constexpr Types F = bit(at::kFloat);
constexpr Types H = bit(at::kHalf);
constexpr Types B = bit(at::kBFloat16);
constexpr Types F64 = bit(at::kDouble);
constexpr Types C64 = bit(at::kComplexFloat);
constexpr Types C128 = bit(at::kComplexDouble);
constexpr Types I8 = bit(at::kChar);
constexpr Types I16 = bit(at::kShort);
constexpr Types I32 = bit(at::kInt);
constexpr Types I64 = bit(at::kLong);
constexpr Types U8 = bit(at::kByte);
constexpr Types U16 = bit(at::kUInt16);
constexpr Types U32 = bit(at::kUInt32);
constexpr Types U64 = bit(at::kUInt64);
constexpr Types BOOL = bit(at::kBool);

constexpr Types kFloats = F | H | B;
constexpr Types kIntegers = I8 | I16 | I32 | I64 | U8 | U16 | U32 | U64;
constexpr Types kNone = 0;
constexpr Types kLargeTypes = F64 | C64 | C128;  // not supported by a 910B's vector or cube units
constexpr Types kSmallTypes = ~kLargeTypes;

constexpr int64_t kFewProbabilities = 5000;

struct Group {
  AiCore ai_core;
  const char* names;  // without `aten::` and without the `_` of in-place forms
};

// The lists of the 910B (DAV_2201) in CANN's op_api, August 2026, by file. If an aclnn function
// casts first, the target type decides.
const Group kGroups[] = {
    // ops-math: math/add, sub, axpy, mul
    {{kFloats | I32 | I64 | I8 | U8 | BOOL | C64, AiCore::kOperands}, "add sub rsub mul"},
    // math/floor_div, mod, floor_mod, pow
    {{kFloats | I32 | I8 | U8, AiCore::kOperands}, "floor_divide fmod pow"},
    {{kSmallTypes, AiCore::kOperands}, "div true_divide remainder"},
    // math/equal, not_equal, greater, greater_equal, less, less_equal
    {{kFloats | I32 | I64 | I8 | U8 | BOOL, AiCore::kOperands}, "eq ne lt"},
    {{kFloats | I32 | I64 | I8 | U8, AiCore::kOperands}, "gt ge le"},
    // math/maximum, minimum, conversion/clip_by_value_v2
    {{kFloats | I32 | I64 | I8, AiCore::kOperands}, "maximum minimum clamp_min clamp_max"},
    {{kFloats | I32 | I64, AiCore::kSelf}, "clamp"},
    // math/neg, abs, sign, round
    {{kFloats | I32 | I64 | I8, AiCore::kSelf}, "neg"},
    {{kFloats | I32 | I64, AiCore::kSelf}, "abs"},
    {{kFloats | I32, AiCore::kSelf}, "sign sgn round"},
    // math/bitwise_and, bitwise_or, bitwise_xor (bool is logical), invert, left_shift
    {{I16 | I32 | I64 | U16 | BOOL, AiCore::kOperands}, "bitwise_and bitwise_or bitwise_xor"},
    {{I16 | U16 | BOOL, AiCore::kSelf}, "bitwise_not"},
    {{kNone, AiCore::kSelf}, "bitwise_left_shift __lshift__ __ilshift__"},
    // math/reduce_sum, reduce_mean, reduce_prod, reduce_max, reduce_min, arg_max_v2, arg_min
    {{kFloats | I32 | I64, AiCore::kSum}, "sum"},
    {{kFloats, AiCore::kSum}, "mean"},
    {{kFloats | I8 | U8 | I32 | I64, AiCore::kSum}, "prod"},
    {{kFloats | U8 | I8 | I32 | I64, AiCore::kSelf}, "amax amin"},
    {{kFloats | I32 | I64, AiCore::kSelf}, "argmax"},
    {{kFloats | I64, AiCore::kSelf}, "argmin"},
    // math/cumsum, cumprod, cummax, cummin
    {{kFloats | I32, AiCore::kSum}, "cumsum"},
    {{kNone, AiCore::kSelf}, "cumprod cummax _cummax_helper"},
    {{kFloats | I8 | U8 | I32, AiCore::kSelf}, "cummin _cummin_helper"},
    // math/sort, topk, search_sorted, bincount, histogram_v2
    {{kFloats, AiCore::kSort}, "sort argsort"},
    {{kFloats, AiCore::kSelf}, "topk"},
    {{kNone, AiCore::kSelf}, "searchsorted bucketize bincount"},
    {{F | H | I8 | U8 | I16 | I32 | I64, AiCore::kSelf}, "histc"},
    // ops-nn: index/non_zero, unique_consecutive, unique_with_counts_*; ops-math: masked_select_v3
    {{kFloats | I8 | U8 | BOOL, AiCore::kNonzero}, "nonzero"},
    {{kNone, AiCore::kSelf}, "_unique _unique2 unique_dim unique_consecutive"},
    {{kFloats | I8 | U8 | I16 | I32 | I64 | F64 | BOOL, AiCore::kSelf}, "masked_select"},
    // ops-math: conversion/masked_fill, math/select; ops-nn: index/masked_scatter
    {{kFloats | I8 | I32 | BOOL, AiCore::kSelf}, "masked_fill"},
    {{kFloats | I8 | U8 | I32 | I64, AiCore::kChoices}, "where"},
    {{kFloats | I8 | U8 | I16 | I32 | I64, AiCore::kSelf}, "masked_scatter"},
    // ops-nn: index/index, index_put_v2, gather_v2, gather_elements, scatter_elements_v2,
    // inplace_scatter_add, scatter_update
    {{kFloats | I8 | U8 | I32 | I64 | BOOL, AiCore::kIndices}, "index"},
    {{kFloats | I8 | U8 | I32 | I64 | BOOL, AiCore::kIndexPut}, "index_put _index_put_impl"},
    {{kFloats | kIntegers | BOOL, AiCore::kSelf}, "index_select embedding take"},
    {{kFloats | kIntegers, AiCore::kSelf}, "gather"},
    {{kFloats | I8 | U8 | I32, AiCore::kSelf}, "scatter scatter_add scatter_reduce"},
    {{kFloats | I16 | I32, AiCore::kSelf}, "index_add"},
    {{kFloats | I32 | I64, AiCore::kSelf}, "index_copy"},
    // ops-math: conversion/fill, math/zero_op, ones_like, range, lin_space
    {{kFloats | I8 | I32 | I64 | U16 | U32 | U64 | BOOL, AiCore::kResult}, "fill full full_like"},
    {{kFloats | I8 | U8 | I32 | I64 | BOOL, AiCore::kResult}, "zero zeros zeros_like"},
    {{kFloats | I8 | U8 | I32 | BOOL, AiCore::kResult}, "ones_like"},
    {{kFloats | I32 | I64, AiCore::kResult}, "arange"},
    {{kFloats | I8 | U8 | I16 | I32, AiCore::kResult}, "linspace"},
    // ops-math: conversion/pack, pad_v3, mirror_pad, ops-nn: index/reverse_v2; ops-math: math/tile
    {{kSmallTypes | F64 | C64, AiCore::kSelf}, "stack"},
    {{kFloats | I8 | I16 | I32 | I64 | U16, AiCore::kSelf}, "constant_pad_nd"},
    {{F | H | I16 | I32 | I64, AiCore::kSelf}, "flip"},
    {{kSmallTypes | C64, AiCore::kSelf}, "repeat tile"},
    // ops-math: random/stateless_randperm, stateless_sample_multinomial
    {{kNone, AiCore::kSelf}, "randperm"},
    {{kSmallTypes, AiCore::kMultinomial}, "multinomial"},
    // ops-math: math/qr, svd, slogdet, triangular_solve, digamma, lgamma; ops-nn: matrix_inverse
    {{kNone, AiCore::kSelf},
     "linalg_qr _linalg_svd _linalg_slogdet triangular_solve linalg_solve_triangular "
     "digamma lgamma linalg_inv_ex"},
};

const std::unordered_map<std::string, AiCore>& rules() {
  static const auto* once = [] {
    auto* made = new std::unordered_map<std::string, AiCore>;
    for (const Group& group : kGroups) {
      std::istringstream names(group.names);
      for (std::string name; names >> name;) made->emplace(name, group.ai_core);
    }
    return made;
  }();
  return *once;
}

// `self` is made contiguous first, and in-place results are copied back.
bool makes_contiguous(const std::string& base) {
  static const std::set<std::string> indexing = {
      "index",          "index_put",    "_index_put_impl", "index_select",
      "embedding",      "take",         "gather",          "index_copy",
      "index_add",      "index_fill",   "scatter",         "scatter_add",
      "scatter_reduce", "index_reduce", "masked_fill",     "masked_scatter"};
  return indexing.count(base) != 0;
}

// The common name of the operator and its in-place form.
std::string base_name(const std::string& name) {
  std::string base = name.substr(name.find("::") + 2);
  bool in_place = base.size() > 1 && base.back() == '_' && base[base.size() - 2] != '_';
  return in_place ? base.substr(0, base.size() - 1) : base;
}

int place_of(const c10::FunctionSchema& schema, const char* name) {
  auto found = schema.argumentIndexWithName(name);
  return found.has_value() ? *found : -1;
}

// The position of `out`, or of `self` for in-place forms; -1 if new memory is written.
int written_by(const c10::FunctionSchema& schema) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* aliasing = schema.arguments()[i].alias_info();
    if (aliasing != nullptr && aliasing->isWrite()) return static_cast<int>(i);
  }
  return -1;
}

uint64_t bytes_to_rearrange(const IValue& value) {
  if (!value.isTensor() || value.toTensor().is_contiguous()) return 0;
  return value.toTensor().numel() * value.toTensor().element_size();
}

// Operators on metadata and addresses only.
bool is_view(const c10::FunctionSchema& schema) {
  if (schema.returns().empty()) return false;
  const auto* aliasing = schema.returns()[0].alias_info();
  return aliasing != nullptr && !aliasing->isWrite();
}

// Undefined if there is none.
at::Tensor first_tensor(const Stack& arguments) {
  for (const IValue& value : arguments) {
    if (value.isTensor() && value.toTensor().defined()) return value.toTensor();
    if (value.isTensorList() && !value.toTensorList().empty()) return value.toTensorList().get(0);
  }
  return {};
}

// From this place on.
ScalarType promoted(const Stack& arguments, size_t place) {
  const IValue& self = arguments[place];
  const IValue& other = arguments[place + 1];
  if (self.isScalar() && other.isTensor()) {
    return at::native::result_type(other.toTensor(), self.toScalar());
  }
  if (!self.isTensor()) return at::kFloat;
  if (other.isTensor()) return at::native::result_type(self.toTensor(), other.toTensor());
  if (other.isScalar()) return at::native::result_type(self.toTensor(), other.toScalar());
  return self.toTensor().scalar_type();
}

bool is_mask(const at::Tensor& index) {
  return index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
}

// Those that are given, by their place.
std::vector<std::pair<size_t, at::Tensor>> indices_of(const Stack& arguments) {
  std::vector<std::pair<size_t, at::Tensor>> given;
  const c10::List<IValue> list = arguments[1].toList();
  for (size_t i = 0; i < list.size(); ++i) {
    const IValue index = list.get(i);
    if (index.isTensor() && index.toTensor().defined()) given.emplace_back(i, index.toTensor());
  }
  return given;
}

// Masks are first converted by `nonzero` to indices of the same shape.
bool are_regular(const std::vector<std::pair<size_t, at::Tensor>>& indices) {
  for (size_t i = 1; i < indices.size(); ++i) {
    const at::Tensor& index = indices[i].second;
    const at::Tensor& before = indices[i - 1].second;
    if (indices[i].first != indices[i - 1].first + 1) return false;
    if (!is_mask(index) && !is_mask(before) && !index.sizes().equals(before.sizes())) return false;
  }
  return true;
}

// With a single mask and value, the framework uses a fill instead.
bool fills(const Stack& arguments, const std::vector<std::pair<size_t, at::Tensor>>& indices) {
  return indices.size() == 1 && is_mask(indices[0].second) && !arguments[3].toBool() &&
         arguments[2].toTensor().numel() == 1;
}

bool index_put_on_ai_cpu(const Stack& arguments) {
  constexpr int64_t kIndices = 100;
  constexpr int64_t kRow = 70;
  constexpr Types kAtomic = kFloats | I8 | I32 | BOOL;
  const at::Tensor& self = arguments[0].toTensor();
  const auto indices = indices_of(arguments);
  if (fills(arguments, indices)) {
    return (bit(self.scalar_type()) & rules().at("masked_fill").types) == 0;
  }
  if (!are_regular(indices)) return true;
  if (indices.empty() || (bit(self.scalar_type()) & kAtomic) != 0) return false;
  int64_t row = 1;
  for (int64_t dim = static_cast<int64_t>(indices.back().first) + 1; dim < self.dim(); ++dim) {
    row *= self.size(dim);
  }
  return indices[0].second.numel() > kIndices || row > kRow;
}

bool sorts_single_elements(const at::Tensor& self, const Stack& arguments, int dim) {
  if (self.dim() == 0) return true;
  bool given = dim >= 0 && arguments[dim].isInt();
  return self.size(given ? at::maybe_wrap_dim(arguments[dim].toInt(), self.dim()) : -1) == 1;
}

void wait(c10::Device device) { c10_npu::getCurrentNPUStream(device.index()).synchronize(); }

void count(npuSimOperator* counter, bool on_ai_cpu, uint64_t hidden_copy_bytes) {
  int code = npuSimCountLaunch(counter, on_ai_cpu, hidden_copy_bytes);
  TORCH_CHECK(code == 0, aclGetRecentErrMsg());
}

// math/cast: the types to which each type is cast on the AI Core.
Types cast_from(ScalarType type) {
  switch (type) {
    case at::kHalf:
      return F | I32 | U8 | B | I8 | BOOL | I16 | I64;
    case at::kFloat:
      return H | I32 | I64 | B | BOOL | U8 | I16 | I8;
    case at::kBFloat16:
      return F | I32 | H | BOOL | I8 | U8 | I64;
    case at::kInt:
      return H | F | I8 | U8 | BOOL | I64 | B | U32 | I16 | U16;
    case at::kLong:
      return F | I32 | H | U8 | BOOL | B | U32 | I16 | U16 | I8;
    case at::kShort:
      return H | F | I64 | I32 | U32 | U16 | I8 | U8;
    case at::kChar:
      return H | F | I32 | B | BOOL | I64 | U32 | I16 | U16 | U8;
    case at::kByte:
      return H | F | I32 | I64 | B | U32 | I16 | U16 | I8;
    case at::kBool:
      return H | F | I32 | U8 | I64 | B | I8;
    case at::kUInt16:
      return I64 | I32 | U32 | I16 | I8 | U8;
    case at::kUInt32:
      return I64 | I32 | I16 | U16 | I8 | U8;
    default:
      return kNone;
  }
}

bool copies_on_ai_cpu(const at::Tensor& to, const at::Tensor& from) {
  if (to.scalar_type() != from.scalar_type() && is_on_device(to) == is_on_device(from)) {
    return (cast_from(from.scalar_type()) & bit(to.scalar_type())) == 0;
  }
  // Contiguous bytes are copied without a kernel.
  bool rearranges = !to.is_contiguous() || !from.is_contiguous();
  return rearranges && (bit(to.scalar_type()) & kLargeTypes) != 0;
}

class Counted final : public c10::OperatorKernel {
 public:
  Counted(const c10::OperatorHandle& op, c10::KernelFunction kernel)
      : cost_(op), arguments_(op.schema().arguments().size()), kernel_(std::move(kernel)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    Launch launch(cost_);
    start(launch, *stack);
    kernel_.callBoxed(op, keys, stack);
  }

 private:
  void start(const Launch& launch, const Stack& stack) const {
    const Stack arguments(stack.end() - static_cast<std::ptrdiff_t>(arguments_), stack.end());
    launch.start(arguments[0].toTensor().device(), arguments);
  }

  const Cost cost_;
  const size_t arguments_;
  const c10::KernelFunction kernel_;
};

}  // namespace

Cost::Cost(const c10::OperatorHandle& op) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string& name = op.operator_name().name;
  const std::string base = base_name(name);
  if (!is_view(schema) && base != "_local_scalar_dense")
    counter_ = npuSimFindOperator(name.c_str());
  auto rule = rules().find(base);
  ai_core_ = rule == rules().end() ? AiCore{kSmallTypes, AiCore::kResult} : rule->second;
  const bool rounds = place_of(schema, "rounding_mode") >= 0;
  if (base == "div" && rounds) ai_core_ = rules().at("floor_divide");
  dtype_ = place_of(schema, "dtype");
  dim_ = place_of(schema, "dim");
  output_size_ = place_of(schema, "output_size");
  makes_contiguous_ = makes_contiguous(base);
  written_ = written_by(schema);
  if (base == "index" || base == "index_put" || base == "_index_put_impl") {
    waits_ = Waits::kForMasks;
  } else if (base == "bincount") {
    waits_ = Waits::kTwice;
  } else if (op.hasTag(at::Tag::data_dependent_output) ||
             op.hasTag(at::Tag::dynamic_output_shape)) {
    waits_ = Waits::kAlways;
  }
}

bool Cost::on_ai_cpu(const Stack& arguments) const {
  if (ai_core_.types == kNone) return true;
  const bool asked = dtype_ >= 0 && arguments[dtype_].isInt();
  const at::Tensor self = first_tensor(arguments);
  ScalarType type = self.defined() ? self.scalar_type() : at::kFloat;
  switch (ai_core_.decides) {
    case AiCore::kOperands:
      type = promoted(arguments, 0);
      break;
    case AiCore::kChoices:
      if (arguments.size() > 2) type = promoted(arguments, 1);
      break;
    case AiCore::kSum:
      if (asked) {
        type = arguments[dtype_].toScalarType();
      } else if (at::isIntegralType(type, true)) {
        type = at::kLong;
      }
      break;
    case AiCore::kResult:
      if (asked) type = arguments[dtype_].toScalarType();
      break;
    case AiCore::kSort:
      if (sorts_single_elements(self, arguments, dim_)) return true;
      break;
    case AiCore::kNonzero:
      if (self.dim() == 0) return true;
      break;
    case AiCore::kIndices:
      if (!are_regular(indices_of(arguments))) return true;
      break;
    case AiCore::kIndexPut:
      if (index_put_on_ai_cpu(arguments)) return true;
      break;
    case AiCore::kMultinomial:
      if (self.numel() <= kFewProbabilities) return true;
      break;
    case AiCore::kSelf:
      break;
  }
  return (ai_core_.types & bit(type)) == 0;
}

uint64_t Cost::hidden_copy_bytes(const Stack& arguments) const {
  if (!makes_contiguous_) return 0;
  uint64_t bytes = bytes_to_rearrange(arguments[0]);
  return written_ < 0 ? bytes : bytes + bytes_to_rearrange(arguments[written_]);
}

int Cost::waits(const Stack& arguments) const {
  if (waits_ == Waits::kForMasks) {
    const auto indices = indices_of(arguments);
    if (arguments.size() > 3 && arguments[3].isBool() && fills(arguments, indices)) {
      return is_on_device(arguments[2].toTensor()) ? 1 : 0;
    }
    return static_cast<int>(std::count_if(indices.begin(), indices.end(),
                                          [](const auto& index) { return is_mask(index.second); }));
  }
  if (output_size_ >= 0 && !arguments[output_size_].isNone()) return 0;
  return waits_ == Waits::kTwice ? 2 : waits_ == Waits::kAlways ? 1 : 0;
}

void Launch::start(c10::Device device, const Stack& arguments) const {
  if (!kernel_.outermost) return;
  if (cost_.counter_ != nullptr) {
    count(cost_.counter_, cost_.on_ai_cpu(arguments), cost_.hidden_copy_bytes(arguments));
  }
  if (cost_.waits_ == Cost::Waits::kNever) return;
  for (int i = cost_.waits(arguments); i > 0; --i) wait(device);
}

CopyLaunch::CopyLaunch(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  static npuSimOperator* counter = npuSimFindOperator("aten::copy_");
  if (!kernel_.outermost) return;
  bool crosses = is_on_device(to) != is_on_device(from);
  const at::Tensor& on_device = is_on_device(to) ? to : from;
  bool in_order = on_device.is_contiguous() && on_device.numel() == to.numel();
  if (!crosses || !in_order) count(counter, copies_on_ai_cpu(to, from), 0);
  if (crosses && !non_blocking) wait(on_device.device());
}

c10::KernelFunction counted(const c10::OperatorHandle& op, c10::KernelFunction kernel) {
  return c10::KernelFunction::makeFromBoxedFunctor<Counted>(
      std::make_unique<Counted>(op, std::move(kernel)));
}

}  // namespace sim::operators
