// SPDX-License-Identifier: Apache-2.0
//
// The costs of operators besides their work: which run on the AI CPU of a 910B, which copy their
// argument first, and for which the host waits. The rules and their sources are in README.md,
// "Costs of operators".
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>

#include "control.h"

namespace sim::operators {

// A set of element types, one bit each.
using Types = uint64_t;

// What decides whether an operator runs on the AI Core.
struct AiCore {
  enum Decides {
    kSelf,        // the type of the first tensor
    kOperands,    // the promoted type of the first two arguments
    kChoices,     // the promoted type of the second and third argument
    kSum,         // the type of the sum, int64 for integers
    kResult,      // the requested type
    kSort,        // as kSelf, and the sorted dimension must be longer than 1
    kNonzero,     // as kSelf, and there must be a dimension
    kIndices,     // as kSelf, and indices must have one shape and adjacent dimensions
    kIndexPut,    // as kIndices, and the amount that is written
    kMultinomial  // whether there are more than 5000 probabilities
  };

  Types types;
  Decides decides;
};

// The costs of one operator, computed once.
class Cost {
 public:
  explicit Cost(const c10::OperatorHandle& op);

 private:
  friend class Launch;

  enum class Waits { kNever, kAlways, kTwice, kForMasks };

  bool on_ai_cpu(const torch::jit::Stack& arguments) const;
  uint64_t hidden_copy_bytes(const torch::jit::Stack& arguments) const;
  int waits(const torch::jit::Stack& arguments) const;

  npuSimOperator* counter_ = nullptr;  // null if nothing is launched
  AiCore ai_core_;
  int dtype_ = -1;        // position among the arguments, or -1
  int dim_ = -1;          // likewise
  int output_size_ = -1;  // likewise
  int written_ = -1;      // likewise
  bool makes_contiguous_ = false;
  Waits waits_ = Waits::kNever;
};

// Exists while an operator's kernel runs.
struct RunningKernel {
  const bool outermost = npuSimEnterKernel() != 0;

  RunningKernel() = default;
  ~RunningKernel() { npuSimLeaveKernel(); }
  RunningKernel(const RunningKernel&) = delete;
  RunningKernel& operator=(const RunningKernel&) = delete;
};

// Exists while a call's kernel runs on the device. Operators that another operator's kernel calls
// are not counted.
class Launch {
 public:
  explicit Launch(const Cost& cost) : cost_(cost) {}

  // Counts the launch, and waits if the framework waits for the result. Throws AscendCL's refusals.
  void start(c10::Device device, const torch::jit::Stack& arguments) const;

 private:
  const Cost& cost_;
  const RunningKernel kernel_;
};

// For a copy that AscendCL alone cannot do.
class CopyLaunch {
 public:
  CopyLaunch(const at::Tensor& to, const at::Tensor& from, bool non_blocking);

 private:
  const RunningKernel kernel_;
};

// Wraps the kernel so that its launches are counted.
c10::KernelFunction counted(const c10::OperatorHandle& op, c10::KernelFunction kernel);

}  // namespace sim::operators
