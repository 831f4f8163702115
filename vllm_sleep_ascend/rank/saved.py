# SPDX-License-Identifier: Apache-2.0
"""What level 2 keeps on the host: all in the memory of the weights that no load brings back.

Parameters can be loaded again. Buffers, tensors that a model keeps in attributes or globals, and
the slots of LoRA adapters cannot, so they are kept whoever holds them: what torch has allocated and
no parameter covers is copied as bytes.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_sleep_ascend.memory.backend import CamemBackend


class SavedContent:
    """That content, while level 2 has discarded it."""

    def __init__(self, backend: "CamemBackend") -> None:
        self._backend = backend
        self._blocks: list[tuple[int, torch.Tensor]] | None = None

    @property
    def saved(self) -> bool:
        """Whether it is kept now."""
        return self._blocks is not None

    def save(self, discarded: Iterable[torch.Tensor]) -> None:
        """Copy to the host what lies in the memory of the weights, awake or in a host backup, and
        is none of ``discarded``.

        Raises:
            SleepModeError: memory sleeps, and its backup cannot be read as it is.
        """
        covered: dict[int, dict[int, int]] = {}
        for tensor in discarded:
            storage = covered.setdefault(tensor.untyped_storage().data_ptr(), {})
            storage[tensor.data_ptr()] = tensor.nbytes
        self._blocks = [
            (address, self._backend.read(address, size))
            for address, size in self._backend.blocks("weights")
            if sum(covered.get(address, {}).values()) < size
        ]

    def restore(self) -> None:
        """Copy it back; the memory is awake."""
        for address, content in self._blocks or ():
            self._backend.write(address, content)

    def forget(self) -> None:
        """Give the copies up."""
        self._blocks = None
