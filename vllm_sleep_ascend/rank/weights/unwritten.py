# SPDX-License-Identifier: Apache-2.0
"""Marks in the memory of weights that came back without content: a mark that is still there says
that nobody has written since, whichever way weights are loaded.

A floating-point weight is marked with a NaN whose fraction bits are all set. Loading such a number
would look like no load; no training gives one. Integers have no such value: they are marked with
the least (unsigned: the greatest) one, and count as unwritten where a whole row still has it.

NPUs reduce integers of 8, 32 and 64 bits on their vector cores, and those of 16 bits on slow ones
(hicann/ops-math, reduce_max). Numbers of 16 bits are therefore looked at in pairs, and a mark is
seen in the second of each: what somebody leaves out is never a single number.

A weight whose storage is tiled (FRACTAL_NZ) is marked and read as it lies there, with what fills up
its tiles: who writes it writes whole tiles.
"""

from collections.abc import Iterable, Sequence

import torch

from vllm_sleep_ascend.memory.formats import as_it_lies

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FRACTION_SET = {torch.int8: 0x7F, torch.int16: 0x7FFF, torch.int32: 0x7FFF_FFFF}
_PAIR = 0x7FFF_7FFF  # two marked numbers of 16 bits
_SECOND_OF_PAIR = 0x7FFF_0000  # no pair without a mark in the second number is as great

# Types whose NaNs include the one with sign 0 and all other bits set.
_FLOATS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


@torch.no_grad()
def mark(tensor: torch.Tensor) -> None:
    """Overwrite all content with marks."""
    if tensor.numel():
        words, value = _words(as_it_lies(tensor.data))
        words.fill_(value)


@torch.no_grad()
def unwritten(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Of each tensor, whether a mark is left in it. Waits once for the device."""
    return _read([_any_mark(as_it_lies(tensor.data)) for tensor in tensors])


@torch.no_grad()
def unwritten_at_start(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Of each tensor, whether its first number is still a mark, which costs next to nothing."""
    return unwritten([_start(as_it_lies(tensor.data)) for tensor in tensors])


def _start(tensor: torch.Tensor) -> torch.Tensor:
    """The first two numbers of a tensor, of integers the first row."""
    if tensor.dtype in _FLOATS:
        dense = _dense(tensor)
        return dense.view(-1)[:2] if dense.is_contiguous() else tensor
    return tensor[:1] if tensor.dim() > 1 else tensor


def _any_mark(tensor: torch.Tensor) -> torch.Tensor:
    """A boolean on the device."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    words, value = _words(tensor)
    if tensor.dtype in _FLOATS:
        return words.amax() >= (_SECOND_OF_PAIR if value == _PAIR else value)
    rows = words.reshape(-1, words.shape[-1]) if words.dim() else words.reshape(1, 1)
    if value > 0:
        return rows.amin(dim=-1).amax() == value
    return rows.amax(dim=-1).amin() == value


def _words(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same memory as integers, and the mark in them."""
    if tensor.dtype not in _FLOATS:
        if tensor.dtype.is_signed and not tensor.dtype.is_floating_point:
            return tensor, torch.iinfo(tensor.dtype).min
        return tensor.view(torch.uint8), 0xFF
    dense = _dense(tensor)
    integer = _INTEGERS[tensor.element_size()]
    if integer is torch.int16 and dense.is_contiguous() and dense.numel() % 2 == 0:
        flat = dense.view(-1)
        if flat.storage_offset() % 2 == 0:
            return flat.view(torch.int32), _PAIR
    return dense.view(integer), _FRACTION_SET.get(integer, torch.iinfo(torch.int64).max)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """With its dimensions in the order in which they lie in memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order)


def _read(flags: Sequence[torch.Tensor]) -> list[bool]:
    return torch.stack(list(flags)).tolist() if flags else []
