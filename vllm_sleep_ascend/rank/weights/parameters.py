# SPDX-License-Identifier: Apache-2.0
"""A model's parameters, each memory once."""

from collections.abc import Iterator

import torch
from torch import nn


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters but those that are a part of another one. Multi-head latent attention has
    such views: who loads the whole has loaded them, and no checkpoint names them."""
    parameters = list(model.named_parameters())
    wholes: dict[int, list[nn.Parameter]] = {}
    for _, parameter in parameters:
        if parameter.is_contiguous() and not parameter.is_meta:
            wholes.setdefault(_storage(parameter), []).append(parameter)
    for name, parameter in parameters:
        within = [] if parameter.is_meta else wholes.get(_storage(parameter), [])
        if not any(_is_part(parameter, whole) for whole in within):
            yield name, parameter


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_part(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    first, last = tensor.storage_offset(), whole.storage_offset() + whole.numel()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = sum((size - 1) * stride for size, stride in steps)
    return (
        0 < tensor.numel() < whole.numel()
        and tensor.dtype == whole.dtype
        and whole.storage_offset() <= first
        and first + extent < last
    )
