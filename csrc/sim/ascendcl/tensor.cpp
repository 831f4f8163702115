// SPDX-License-Identifier: Apache-2.0
//
// Descriptions of tensors and buffers, which the framework creates for compiled operators.
#include "ascendcl/tensor.h"

#include <acl/acl_op.h>

struct aclDataBuffer {
  void* data;
  size_t bytes;
};

extern "C" {

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* sizes,
                                   aclFormat format) {
  std::vector<int64_t> all(sizes, sizes + (sizes == nullptr ? 0 : count));
  return new aclTensorDesc{type, format, all, "", format, all};
}

void aclDestroyTensorDesc(const aclTensorDesc* tensor) { delete tensor; }
aclDataType aclGetTensorDescType(const aclTensorDesc* tensor) { return tensor->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc* tensor) { return tensor->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* tensor) { return tensor->sizes.size(); }

aclError aclGetTensorDescDimV2(const aclTensorDesc* tensor, size_t index, int64_t* size) {
  if (index >= tensor->sizes.size()) return ACL_ERROR_INVALID_PARAM;
  *size = tensor->sizes[index];
  return ACL_SUCCESS;
}

void aclSetTensorDescName(aclTensorDesc* tensor, const char* name) { tensor->name = name; }

aclError aclSetTensorFormat(aclTensorDesc* tensor, aclFormat format) {
  tensor->storage_format = format;
  return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc* tensor, int count, const int64_t* sizes) {
  tensor->storage_sizes.assign(sizes, sizes + count);
  return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }

aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) {
  return new aclDataBuffer{data, bytes};
}
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}
void* aclGetDataBufferAddr(const aclDataBuffer* buffer) { return buffer->data; }
size_t aclGetDataBufferSizeV2(const aclDataBuffer* buffer) { return buffer->bytes; }

}  // extern "C"
