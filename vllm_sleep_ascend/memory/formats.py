# SPDX-License-Identifier: Apache-2.0
"""Tensors whose elements are not stored in logical order, such as those in FRACTAL_NZ.

In torch_npu the format belongs to the storage. Every tensor over that storage has it, even one made
with ``set_``, and copies of it convert. Raw bytes are therefore read and written through a separate
storage at the same address (``memory_at``), which has no format.
"""

import torch

from vllm_sleep_ascend.memory.checksum import memory_at

_IN_ORDER = {-1, 0, 1, 2, 27, 30}  # undefined, NCHW, NHWC, ND, NDHWC and NCDHW of aclFormat
_TILE_ROW_BYTES = 32


def is_tiled(tensor: torch.Tensor) -> bool:
    """Whether the tensor's storage is in one of the NPU's own formats."""
    if tensor.device.type != "npu":
        return False
    import torch_npu

    return torch_npu.get_npu_format(tensor) not in _IN_ORDER


def as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or if its storage is tiled, the raw storage in rows."""
    if not is_tiled(tensor):
        return tensor
    storage = tensor.untyped_storage()
    memory = memory_at(storage.data_ptr(), storage.nbytes(), tensor.dtype, tensor.device)
    return memory.view(-1, _TILE_ROW_BYTES // tensor.element_size())
