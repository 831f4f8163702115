// SPDX-License-Identifier: Apache-2.0
//
// What operators cost beyond their work: which run on the AI CPU of a 910B, which copy their
// argument first, for which the host waits. The rules and their sources are in README.md, "Costs of
// operators".
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>

#include "control.h"

namespace sim::operators {

// Types of elements, a bit for each.
using Types = uint64_t;

// What decides for an operator whether it runs on the AI Core.
struct AiCore {
  enum Decides {
    kSelf,        // the type of the first tensor
    kOperands,    // what the first two arguments are promoted to
    kChoices,     // likewise the second and the third
    kSum,         // the type to sum up in, of integers int64
    kResult,      // the type that is asked for
    kSort,        // as kSelf, and that the sorted dimension is longer than 1
    kNonzero,     // as kSelf, and that there is a dimension
    kIndices,     // as kSelf, and indices of one shape beside each other
    kIndexPut,    // as kIndices, and how much is written
    kMultinomial  // whether there are more than 5000 probabilities
  };

  Types types;
  Decides decides;
};

// Of one operator, worked out once.
class Cost {
 public:
  explicit Cost(const c10::OperatorHandle& op);

 private:
  friend class Launch;

  enum class Waits { kNever, kAlways, kTwice, kForMasks };

  bool on_ai_cpu(const torch::jit::Stack& arguments) const;
  uint64_t hidden_copy_bytes(const torch::jit::Stack& arguments) const;
  int waits(const torch::jit::Stack& arguments) const;

  npuSimOperator* counter_ = nullptr;  // null: nothing is launched
  AiCore ai_core_;
  int dtype_ = -1;        // place among the arguments, -1: none
  int dim_ = -1;          // likewise
  int output_size_ = -1;  // likewise
  int written_ = -1;      // likewise
  bool makes_contiguous_ = false;
  Waits waits_ = Waits::kNever;
};

// The kernel of an operator, for as long as it runs.
struct RunningKernel {
  const bool outermost = npuSimEnterKernel() != 0;

  RunningKernel() = default;
  ~RunningKernel() { npuSimLeaveKernel(); }
  RunningKernel(const RunningKernel&) = delete;
  RunningKernel& operator=(const RunningKernel&) = delete;
};

// A call of an operator on the device, for as long as its kernel runs. Nothing is counted that
// another operator's kernel calls.
class Launch {
 public:
  explicit Launch(const Cost& cost) : cost_(cost) {}

  // Counts it, and waits where the framework waits for the result. Throws what AscendCL refuses.
  void start(c10::Device device, const torch::jit::Stack& arguments) const;

 private:
  const Cost& cost_;
  const RunningKernel kernel_;
};

// Of a copy that the framework would not leave to AscendCL alone.
class CopyLaunch {
 public:
  CopyLaunch(const at::Tensor& to, const at::Tensor& from, bool non_blocking);

 private:
  const RunningKernel kernel_;
};

// The kernel, with its launches counted.
c10::KernelFunction counted(const c10::OperatorHandle& op, c10::KernelFunction kernel);

}  // namespace sim::operators
