# SPDX-License-Identifier: Apache-2.0
"""What level 2 keeps on the host: everything in the weights' memory that no load restores.

Parameters can be loaded again. Buffers, tensors in attributes or globals of a model, and the slots
of LoRA adapters cannot. So everything that torch has allocated and no parameter covers is copied as
bytes.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_sleep_ascend.memory.backend import CamemBackend


class SavedContent:
    """This content, while level 2 has discarded its memory."""

    def __init__(self, backend: "CamemBackend") -> None:
        self._backend = backend
        self.forget()

    @property
    def saved(self) -> bool:
        """Whether content is saved now."""
        return self._backend.saved is not None

    def save(self, discarded: Iterable[torch.Tensor]) -> None:
        """Copy to the host what is in the weights' memory, awake or in a host backup, except
        ``discarded``.

        Raises:
            SleepModeError: memory sleeps, and its backup cannot be read.
        """
        covered: dict[int, dict[int, int]] = {}
        for tensor in discarded:
            storage = covered.setdefault(tensor.untyped_storage().data_ptr(), {})
            storage[tensor.data_ptr()] = tensor.nbytes
        self._backend.saved = [
            (address, self._backend.read(address, size))
            for address, size in self._backend.blocks("weights")
            if sum(covered.get(address, {}).values()) < size
        ]

    def restore(self) -> None:
        """Copy it back. The memory must be awake."""
        for address, content in self._backend.saved or ():
            self._backend.write(address, content)

    def forget(self) -> None:
        """Drop the copies."""
        self._backend.saved = None
