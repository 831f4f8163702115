# SPDX-License-Identifier: Apache-2.0
"""FRACTAL_NZ: matrices are stored in tiles, and the format belongs to the storage."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torch_npu

NZ, ND = 29, 2


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """torch keeps streams and events, so their numbers are not compared."""
    torch.npu.set_device(0)
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.synchronize()
    torch.npu.empty_cache()


def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).remainder(113).view(shape).to(dtype)


def in_tiles(x: torch.Tensor, width: int) -> torch.Tensor:
    """Tiles of 16 rows, column by column, with zeros beyond the matrix."""
    padded = F.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % 16))
    tiles = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, 16))
    return tiles.movedim(-2, -4).contiguous()


def cast(x: torch.Tensor) -> torch.Tensor:
    tiled = torch_npu.npu_format_cast(x.npu(), NZ)
    assert torch_npu.get_npu_format(tiled) == NZ
    return tiled


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's storage as plain elements: another storage at the same address."""
    storage = tensor.untyped_storage()
    where = storage.data_ptr(), tensor.device, storage.nbytes()
    own = torch_npu._C._construct_storage_from_data_pointer(*where)
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(own)


@pytest.mark.parametrize(
    "shape,dtype,width",
    [
        ((32, 48), torch.float16, 16),
        ((40, 35), torch.bfloat16, 16),
        ((20, 50), torch.int8, 32),
        ((3, 17, 16), torch.float16, 16),
        ((33, 40), torch.float32, 16),
    ],
)
def test_a_cast_puts_matrices_into_tiles_and_back(shape, dtype, width) -> None:
    x = numbers(*shape, dtype=dtype)
    tiled = cast(x)
    assert torch.equal(memory(tiled).cpu(), in_tiles(x, width).flatten())
    assert torch.equal(tiled.cpu(), x)
    back = torch_npu.npu_format_cast(tiled, ND)
    assert torch_npu.get_npu_format(back) == ND
    assert torch.equal(memory(back).cpu(), x.flatten())


def test_every_view_of_the_storage_has_its_format() -> None:
    """Copying a view is not a copy of the bytes. Writing through a view aborts the process."""
    x = numbers(40, 48)
    tiled = cast(x)
    exact = memory(tiled).cpu()
    view = torch.empty(0, dtype=torch.uint8, device="npu").set_(tiled.untyped_storage())
    assert torch_npu.get_npu_format(view) == NZ
    assert view.nbytes == exact.nbytes
    assert not torch.equal(view.cpu(), exact.view(torch.uint8))
    same_type = torch.empty(0, dtype=x.dtype, device="npu").set_(tiled.untyped_storage())
    assert not torch.equal(same_type.cpu(), exact)
    tiled.zero_()
    memory(tiled).copy_(exact)
    assert torch.equal(tiled.cpu(), x)


def test_operators_see_the_elements_in_their_order() -> None:
    x, y = numbers(40, 48), numbers(48, 32)
    tiled = cast(y)
    assert torch.equal((x.npu() @ tiled).cpu(), (x.npu() @ y.npu()).cpu())
    assert torch.equal((tiled + 1).cpu(), y + 1)
    assert torch.equal(tiled[3:20, ::2].cpu(), y[3:20, ::2])
    assert torch.equal(tiled.t().contiguous().cpu(), y.t())
    assert torch.equal(tiled.float().cpu(), y.float())


def test_what_is_written_lies_in_tiles() -> None:
    x = numbers(40, 48)
    tiled, other = cast(torch.zeros_like(x)), cast(x + 1)
    tiled.add_(x.npu())
    assert torch.equal(memory(tiled).cpu(), in_tiles(x, 16).flatten())
    tiled.copy_(other)
    assert torch.equal(memory(tiled).cpu(), memory(other).cpu())
    tiled.copy_(x)
    assert torch.equal(memory(tiled).cpu(), in_tiles(x, 16).flatten())
    tiled[:16].mul_(2)
    assert torch.equal(tiled.cpu(), torch.cat([2 * x[:16], x[16:]]))


def test_elements_of_another_type_have_no_order() -> None:
    tiled = cast(numbers(32, 32))
    with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
        tiled.view(torch.int16).add_(1)
