# SPDX-License-Identifier: Apache-2.0
"""A model's parameters, each memory once."""

from collections.abc import Callable, Iterator

import torch
from torch import nn


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters but those that are a part of another one. Multi-head latent attention has
    such views: who loads the whole has loaded them, and no checkpoint names them."""
    for name, parameter, whole in _with_wholes(model):
        if whole is None:
            yield name, parameter


def clone_parameters(model: nn.Module, which: Callable[[nn.Parameter], bool]) -> None:
    """Copy parameters into new memory. Those that are a part of another one stay a part of it."""
    found = list(_with_wholes(model))
    offsets = {id(parameter): parameter.storage_offset() for _, parameter, _ in found}
    for _, parameter, whole in found:
        if whole is None and which(parameter):
            parameter.data = parameter.data.clone()
    for _, part, whole in found:
        if whole is not None and which(whole):
            start = offsets[id(part)] - offsets[id(whole)] + whole.storage_offset()
            part.data = whole.data.as_strided(part.shape, part.stride(), start)


def derive_again(model: nn.Module, dtype: torch.dtype | str) -> None:
    """Have layers of multi-head latent attention derive the matrices that are no views, in place.

    vLLM does so after other loads. One in the kernels' format copies parameters, and no more."""
    own = {id(parameter) for _, parameter in own_parameters(model)}
    for layer in model.modules():
        if id(layer._parameters.get("W_UV")) in own:
            layer.process_weights_after_loading(dtype)  # type: ignore[operator]


def _with_wholes(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter | None]]:
    """Each parameter, with the largest one that it is a part of."""
    parameters = list(model.named_parameters())
    wholes: dict[int, list[nn.Parameter]] = {}
    for _, parameter in parameters:
        if parameter.is_contiguous() and not parameter.is_meta:
            wholes.setdefault(_storage(parameter), []).append(parameter)
    for name, parameter in parameters:
        within = [] if parameter.is_meta else wholes.get(_storage(parameter), [])
        those = (whole for whole in within if _is_part(parameter, whole))
        yield name, parameter, max(those, key=torch.Tensor.numel, default=None)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_part(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    first, last = tensor.storage_offset(), whole.storage_offset() + whole.numel()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = sum((size - 1) * stride for size, stride in steps)
    return bool(
        0 < tensor.numel() < whole.numel()
        and tensor.dtype == whole.dtype
        and whole.storage_offset() <= first
        and first + extent < last
    )
