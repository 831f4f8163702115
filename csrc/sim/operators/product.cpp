// SPDX-License-Identifier: Apache-2.0
//
// Matrix products. CPUs without instructions for a 16-bit type are several times faster in fp32, so
// products of such a type are computed in fp32 and rounded once.
#include "operators/cost.h"
#include "operators/narrow.h"
#include "operators/operators.h"

namespace sim::operators {
namespace {

constexpr int64_t kBlockElements = 8 << 20;  // weights that are widened at a time

// Up to this many rows, reading the weights takes longer than multiplying.
constexpr int64_t kNarrowRows = 16;
constexpr int64_t kNarrowRowsOfFastTypes = 4;

bool is_half(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
}

bool is_fast(const at::Tensor& tensor) {
  static const bool fast_bfloat16 = __builtin_cpu_supports("avx512bf16");
  return !is_half(tensor) || (tensor.scalar_type() == at::kBFloat16 && fast_bfloat16);
}

at::Tensor widened(const at::Tensor& on_cpu) {
  return is_half(on_cpu) ? on_cpu.to(at::kFloat) : on_cpu;
}

// What is added to a product: the result is beta * self + alpha * product.
struct Sum {
  at::Tensor self;  // undefined if nothing is added
  at::Scalar beta = 1;
  at::Scalar alpha = 1;

  at::Tensor of(const at::Tensor& product) const {
    at::Tensor scaled = alpha.equal(1) ? product : product.mul(alpha);
    if (!self.defined() || beta.equal(0)) return scaled;
    return scaled.add(widened(self), beta);
  }

  Sum columns(int64_t begin, int64_t count) const {
    bool wide = self.defined() && self.dim() > 0 && self.size(-1) > 1;
    return wide ? Sum{self.narrow(-1, begin, count), beta, alpha} : *this;
  }
};

// All tensors are on the CPU from here on, in the thread of a stream if a graph runs.

at::Tensor narrow_product(const at::Tensor& a, const at::Tensor& b) {
  int64_t padded = padded_depth(a.size(1));
  at::Tensor inputs = at::zeros({a.size(0), padded}, at::kFloat);
  inputs.narrow(1, 0, a.size(1)).copy_(a);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, at::kFloat);
  run({.rows = a.size(0),
       .columns = b.size(1),
       .depth = a.size(1),
       .inputs = inputs.const_data_ptr<float>(),
       .padded_depth = padded,
       .weights = static_cast<const uint16_t*>(b.const_data_ptr()),
       .weight_stride = b.stride(1),
       .is_bfloat16 = b.scalar_type() == at::kBFloat16,
       .out = out.mutable_data_ptr<float>()});
  return out;
}

bool is_narrow(const at::Tensor& a, const at::Tensor& b) {
  bool weights_in_rows = b.stride(0) == 1 && b.stride(1) >= b.size(0);
  int64_t limit = is_fast(b) ? kNarrowRowsOfFastTypes : kNarrowRows;
  return is_half(b) && weights_in_rows && a.size(0) <= limit;
}

void widened_product(const at::Tensor& a, const at::Tensor& b, const Sum& sum, at::Tensor& out) {
  at::Tensor inputs = widened(a);
  int64_t block = std::max<int64_t>(64, kBlockElements / std::max<int64_t>(1, b.size(0)));
  for (int64_t begin = 0; begin < b.size(1); begin += block) {
    int64_t count = std::min(block, b.size(1) - begin);
    at::Tensor product = at::mm(inputs, widened(b.narrow(1, begin, count)));
    out.narrow(1, begin, count).copy_(sum.columns(begin, count).of(product));
  }
}

void product(const at::Tensor& a, const at::Tensor& b, const Sum& sum, at::Tensor& out) {
  if (is_narrow(a, b)) {
    out.copy_(sum.of(narrow_product(a, b)));
  } else if (!is_fast(b)) {
    widened_product(a, b, sum, out);
  } else if (sum.self.defined()) {
    at::addmm_out(out, sum.self, a, b, sum.beta, sum.alpha);
  } else {
    at::mm_out(out, a, b);
  }
}

void batched_product(const at::Tensor& a, const at::Tensor& b, const Sum& sum, at::Tensor& out) {
  if (!is_fast(a)) {
    out.copy_(sum.of(at::bmm(widened(a), widened(b))));
  } else if (sum.self.defined()) {
    at::baddbmm_out(out, sum.self, a, b, sum.beta, sum.alpha);
  } else {
    at::bmm_out(out, a, b);
  }
}

// For device tensors: checks them, then computes the product on their memory.

using Kernel = void (*)(const at::Tensor&, const at::Tensor&, const Sum&, at::Tensor&);

void check_pair(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.device() == b.device(),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              a.device(), " and ", b.device(), "!");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(),
              "expected m1 and m2 to have the same dtype, but "
              "got: ",
              a.scalar_type(), " != ", b.scalar_type());
}

void check_matrices(const at::Tensor& a, const at::Tensor& b) {
  check_pair(a, b);
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "mat1 and mat2 shapes cannot be multiplied (", a.sizes(), " and ", b.sizes(), ")");
}

void check_batches(const at::Tensor& a, const at::Tensor& b) {
  check_pair(a, b);
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
              "batch1 and batch2 shapes cannot be multiplied (", a.sizes(), " and ", b.sizes(),
              ")");
}

at::Tensor& run_on_device(const char* name, Kernel kernel, const at::Tensor& a, const at::Tensor& b,
                          const Sum& sum, at::Tensor& out) {
  std::vector<Operand> read = {Operand(a), Operand(b)};
  if (sum.self.defined()) read.push_back(Operand(sum.self));
  const Operand written(out);
  launch(name, a.device(), read, {written}, [=, beta = sum.beta, alpha = sum.alpha] {
    AllCores cores;
    at::Tensor on_cpu = written.on_cpu();
    const Sum added = {read.size() > 2 ? read[2].on_cpu() : at::Tensor(), beta, alpha};
    kernel(read[0].on_cpu(), read[1].on_cpu(), added, on_cpu);
  });
  return out;
}

void resize(at::Tensor& out, at::IntArrayRef sizes) {
  if (!out.sizes().equals(sizes)) out.resize_(sizes);
}

Sum sum_with(const at::Tensor& self, const at::Tensor& a, const at::Scalar& beta,
             const at::Scalar& alpha) {
  check_pair(self, a);
  return {self, beta, alpha};
}

at::Tensor& mm_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& out) {
  check_matrices(a, b);
  resize(out, {a.size(0), b.size(1)});
  return run_on_device("aten::mm", product, a, b, {}, out);
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) {
  check_matrices(a, b);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  return run_on_device("aten::mm", product, a, b, {}, out);
}

at::Tensor& addmm_out(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                      const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  check_matrices(a, b);
  resize(out, {a.size(0), b.size(1)});
  return run_on_device("aten::addmm", product, a, b, sum_with(self, a, beta, alpha), out);
}

at::Tensor addmm(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                 const at::Scalar& beta, const at::Scalar& alpha) {
  at::Tensor out = at::empty({0}, a.options());
  return addmm_out(self, a, b, beta, alpha, out);
}

at::Tensor& bmm_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& out) {
  check_batches(a, b);
  resize(out, {a.size(0), a.size(1), b.size(2)});
  return run_on_device("aten::bmm", batched_product, a, b, {}, out);
}

at::Tensor bmm(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = at::empty({0}, a.options());
  return bmm_out(a, b, out);
}

at::Tensor& baddbmm_out(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                        const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  check_batches(a, b);
  resize(out, {a.size(0), a.size(1), b.size(2)});
  return run_on_device("aten::baddbmm", batched_product, a, b, sum_with(self, a, beta, alpha), out);
}

at::Tensor baddbmm(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                   const at::Scalar& beta, const at::Scalar& alpha) {
  at::Tensor out = at::empty({0}, a.options());
  return baddbmm_out(self, a, b, beta, alpha, out);
}

at::Tensor& addmm_(at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                   const at::Scalar& beta, const at::Scalar& alpha) {
  return addmm_out(self, a, b, beta, alpha, self);
}

at::Tensor& baddbmm_(at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                     const at::Scalar& beta, const at::Scalar& alpha) {
  return baddbmm_out(self, a, b, beta, alpha, self);
}

template <typename Function>
void install_kernel(const char* name, const char* overload, Function function) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
  install(op, c10::DispatchKey::PrivateUse1,
          counted(op, c10::KernelFunction::makeFromUnboxedFunction(function)));
}

}  // namespace

void install_products() {
  install_kernel("aten::mm", "", TORCH_FN(mm));
  install_kernel("aten::mm", "out", TORCH_FN(mm_out));
  install_kernel("aten::addmm", "", TORCH_FN(addmm));
  install_kernel("aten::addmm", "out", TORCH_FN(addmm_out));
  install_kernel("aten::addmm_", "", TORCH_FN(addmm_));
  install_kernel("aten::bmm", "", TORCH_FN(bmm));
  install_kernel("aten::bmm", "out", TORCH_FN(bmm_out));
  install_kernel("aten::baddbmm", "", TORCH_FN(baddbmm));
  install_kernel("aten::baddbmm", "out", TORCH_FN(baddbmm_out));
  install_kernel("aten::baddbmm_", "", TORCH_FN(baddbmm_));
}

}  // namespace sim::operators
