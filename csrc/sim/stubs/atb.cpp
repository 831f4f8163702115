// SPDX-License-Identifier: Apache-2.0
//
// The part of CANN's transformer library that torch_npu links. Its operations are simulated above
// it, in PyTorch; calls that get here are refused.
#include <cstdint>

#pragma GCC visibility push(default)

namespace atb {

constexpr int kUnsupported = 2;  // any status but 0

struct Context;
struct Operation;
struct Tensor;

int CreateContext(Context** context) {
  *context = nullptr;
  return kUnsupported;
}

int DestroyContext(Context*) { return 0; }

int DestroyOperation(Operation*) { return 0; }

template <typename Param>
int CreateOperation(const Param&, Operation** operation) {
  *operation = nullptr;
  return kUnsupported;
}

struct Utils {
  static uint64_t GetTensorSize(const Tensor&);
};

uint64_t Utils::GetTensorSize(const Tensor&) { return 0; }

namespace infer {
struct ElewiseParam;
struct GroupTopkParam;
struct LinearParam;
struct PagedAttentionParam;
struct ReshapeAndCacheParam;
struct RmsNormParam;
struct RopeParam;
struct SelfAttentionParam;
}  // namespace infer

template int CreateOperation(const infer::ElewiseParam&, Operation**);
template int CreateOperation(const infer::GroupTopkParam&, Operation**);
template int CreateOperation(const infer::LinearParam&, Operation**);
template int CreateOperation(const infer::PagedAttentionParam&, Operation**);
template int CreateOperation(const infer::ReshapeAndCacheParam&, Operation**);
template int CreateOperation(const infer::RmsNormParam&, Operation**);
template int CreateOperation(const infer::RopeParam&, Operation**);
template int CreateOperation(const infer::SelfAttentionParam&, Operation**);

}  // namespace atb

#pragma GCC visibility pop
