# SPDX-License-Identifier: Apache-2.0
"""Tensors in the memory of the weights that belong to no parameter and no buffer.

vllm-ascend keeps some: rotary tables in globals of a module, matrices that are derived from weights
in attributes. No load of weights brings them back, so level 2 keeps them on the host.
"""

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_sleep_ascend import _camem

if TYPE_CHECKING:
    from vllm_sleep_ascend.backend import CamemBackend


class StrayTensors:
    """Their content, while level 2 has discarded it."""

    def __init__(self, backend: "CamemBackend") -> None:
        self._backend = backend
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def saved(self) -> bool:
        """Whether any content is kept."""
        return bool(self._saved)

    def save(self, models: Iterable[nn.Module]) -> None:
        """Copy to the host what no parameter and no buffer of these models holds."""
        held = {
            tensor.untyped_storage().data_ptr()
            for model in models
            for tensor in (*model.parameters(), *model.buffers())
        }
        self._saved = [(flat, self._backend.host_copy(flat)) for flat in _flat_storages(held)]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy it back; the memory is awake."""
        for flat, content in self._saved:
            flat.copy_(content)

    def forget(self) -> None:
        """Give the copies up."""
        self._saved = []


def _flat_storages(held: set[int]) -> list[torch.Tensor]:
    """Each storage in the memory of weights but these, as bytes."""
    ranges = [
        (a["address"], a["address"] + a["bytes"])
        for a in _camem.allocations()
        if a["tag"] == "weights"
    ]
    flat: dict[int, torch.Tensor] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or thing.device.type != "npu":
            continue
        storage = thing.untyped_storage()
        address = storage.data_ptr()
        if address in held or address in flat:
            continue
        if any(start <= address < end for start, end in ranges):
            flat[address] = torch.empty(0, dtype=torch.uint8, device=thing.device).set_(storage)
    return list(flat.values())
