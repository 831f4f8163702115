# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model that an image holds, and where their bytes lie in memory and in a file.

vLLM processes weights after it has loaded them: layers get other parameters, and tensors that are
plain attributes. So an image holds parameters, buffers (also those that a checkpoint leaves out)
and tensors in attributes, by their names, as raw bytes. Memory that several tensors share is there
once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.memory.checksum import memory_at
from vllm_sleep_ascend.memory.formats import is_tiled

_ALIGNMENT = 512  # of copies from and to a device
_DEPTH = 4  # of containers and of vLLM's objects within a module's attributes
_OF_MODULES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Held:
    """A tensor. ``address`` and ``bytes`` are those from its first byte to its last one; of one in
    the NPU's own formats, of its storage. ``kind`` is what it needs to have in common with another
    one to take its bytes."""

    kind: str
    stride: tuple[int, ...]
    address: int
    bytes: int
    device: torch.device


@dataclass(frozen=True)
class Span:
    """Bytes of a file from ``offset`` on, and their memory."""

    offset: int
    address: int
    bytes: int
    device: torch.device


def registered(model: nn.Module) -> dict[str, Held]:
    """Parameters and buffers."""
    return {
        f"{path}.{name}".lstrip("."): held(tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def attached(model: nn.Module) -> dict[str, Held]:
    """Tensors in attributes of a model's layers, and of vLLM's objects there."""
    found: dict[str, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if name not in _OF_MODULES:
                for where, tensor in _within(value, f"{path}.{name}".lstrip("."), _DEPTH):
                    found[where] = held(tensor)
    return {name: tensor for name, tensor in found.items() if tensor.bytes}


def held(tensor: torch.Tensor) -> Held:
    """What is to be known of a tensor."""
    data = tensor.data
    address, size = data.data_ptr(), 0
    tiled = is_tiled(data)
    if tiled:
        storage = data.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    elif data.numel() and not data.is_meta:
        steps = zip(data.shape, data.stride(), strict=True)
        size = (sum((count - 1) * stride for count, stride in steps) + 1) * data.element_size()
    return Held(kind(data, data.stride()), tuple(data.stride()), address, size, data.device)


def kind(tensor: torch.Tensor, stride: Sequence[int]) -> str:
    """Type, shape, these strides, and format: of aclFormat, -1 on another device than an NPU."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape, steps = "x".join(map(str, tensor.shape)), "x".join(map(str, stride))
    return f"{dtype} {shape or 'scalar'} stride {steps or '-'} format {_format(tensor)}"


def laid_out(tensors: Mapping[str, Held]) -> tuple[dict[str, int], list[Span], int]:
    """A file for these tensors: the offset of each, what goes where, and its bytes."""
    offsets, spans, end = dict.fromkeys(tensors, 0), [], 0
    for names in by_memory(tensors):
        span = _span(names, tensors, end)
        spans.append(span)
        offsets |= {name: end + tensors[name].address - span.address for name in names}
        end += -(-span.bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, spans, end


def placed(tensors: Mapping[str, Held], offsets: Mapping[str, int]) -> list[Span]:
    """What of a file with these offsets goes where in the memory of these tensors.

    Raises:
        ImageError: tensors that share memory here lie apart there.
    """
    spans = []
    for names in by_memory(tensors):
        first, *others = names
        start = offsets[first] - tensors[first].address
        for other in others:
            if offsets[other] - tensors[other].address != start:
                raise ImageError(
                    f"{first} and {other} share memory in this engine, and have content of their "
                    "own in the image; start with the options of the engine that saved it"
                )
        lowest = min(tensors[name].address for name in names)
        spans.append(_span(names, tensors, start + lowest))
    return spans


def not_within(tensors: Mapping[str, Held], wholes: Iterable[Held]) -> list[torch.Tensor]:
    """The memory of those tensors as bytes, once, without that of tensors within one of these."""
    known = [(_place(whole), whole.bytes) for whole in wholes]
    outside = {
        name: tensor
        for name, tensor in tensors.items()
        if not any(
            place[0] == str(tensor.device)
            and place[1] <= tensor.address
            and tensor.address + tensor.bytes <= place[1] + size
            for place, size in known
        )
    }
    _, spans, _ = laid_out(outside)
    return [memory_at(s.address, s.bytes, torch.uint8, s.device) for s in spans]


def by_memory(tensors: Mapping[str, Held]) -> Iterator[list[str]]:
    """The names of tensors that overlap, together."""
    names: list[str] = []
    end: tuple[str, int] | None = None
    for name in sorted(tensors, key=lambda name: _place(tensors[name])):
        tensor = tensors[name]
        if not tensor.bytes:
            continue
        device, start = _place(tensor)
        if end is not None and (device != end[0] or start >= end[1]):
            yield names
            names, end = [], None
        names.append(name)
        end = (device, max(start + tensor.bytes, end[1] if end else 0))
    if names:
        yield names


def _place(tensor: Held) -> tuple[str, int]:
    return str(tensor.device), tensor.address


def _span(names: Iterable[str], tensors: Mapping[str, Held], offset: int) -> Span:
    those = [tensors[name] for name in names]
    start = min(tensor.address for tensor in those)
    end = max(tensor.address + tensor.bytes for tensor in those)
    return Span(offset, start, end - start, those[0].device)


def _within(value: object, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            yield name, value
        return
    if depth == 0 or isinstance(value, nn.Module | type):
        return
    if isinstance(value, dict):
        inner: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    elif type(value).__module__.startswith("vllm") and ".config" not in type(value).__module__:
        inner = getattr(value, "__dict__", {}).items()
    else:
        return
    for key, part in inner:
        yield from _within(part, f"{name}.{key}", depth - 1)


def _format(tensor: torch.Tensor) -> int:
    if tensor.device.type != "npu":
        return -1
    import torch_npu

    return int(torch_npu.get_npu_format(tensor))
