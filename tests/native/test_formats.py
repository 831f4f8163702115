# SPDX-License-Identifier: Apache-2.0
"""Tensors in tiles (FRACTAL_NZ): their bytes are kept, and marks of unwritten weights are found.
Needs CANN or the simulator."""

import pytest
import torch

torch_npu = pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN")

from vllm_sleep_ascend.memory.checksum import memory_at  # noqa: E402
from vllm_sleep_ascend.memory.formats import as_it_lies, is_tiled  # noqa: E402
from vllm_sleep_ascend.rank.weights.unwritten import mark, unwritten, unwritten_at_start  # noqa: E402

NZ = 29


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Sizes are not multiples of a tile."""
    return torch.arange(40 * 35).remainder(113).view(40, 35).to(dtype)


@pytest.fixture
def tiled():
    torch.npu.config.allow_internal_format = True
    return lambda dtype: torch_npu.npu_format_cast(numbers(dtype).npu(), NZ)


def test_which_tensors_are_tiled(tiled):
    nz = tiled(torch.float16)
    assert is_tiled(nz) and is_tiled(nz[:3]) and is_tiled(nz.t())
    plain = numbers(torch.float16)
    assert not is_tiled(plain) and not is_tiled(plain.npu())
    assert as_it_lies(plain) is plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_bytes_are_read_and_written_as_they_lie(tiled, dtype):
    nz = tiled(dtype)
    storage = nz.untyped_storage()
    where = storage.data_ptr(), storage.nbytes(), torch.uint8, nz.device
    content = memory_at(*where).cpu()
    nz.zero_()
    memory_at(*where).copy_(content)
    assert torch.equal(nz.cpu(), numbers(dtype))
    assert torch.equal(as_it_lies(nz).cpu().flatten().view(torch.uint8), content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_marks(tiled, dtype):
    nz, other = tiled(dtype), tiled(dtype)
    assert unwritten([nz]) == unwritten_at_start([nz]) == [False]
    mark(nz)
    assert unwritten([nz, other]) == unwritten_at_start([nz, other]) == [True, False]
    for written in (other, numbers(dtype).npu(), numbers(dtype)):
        mark(nz)
        nz.copy_(written)
        assert unwritten([nz]) == unwritten_at_start([nz]) == [False]
        assert torch.equal(nz.cpu(), numbers(dtype))
