# SPDX-License-Identifier: Apache-2.0
"""The tensors of every benchmark: weights with known content, and a KV cache."""

import torch

from bench.allocators import Allocator
from bench.machine import MIB, Machine, checksum
from bench.models import Model


class Weights:
    """A model's weights, in memory of tag "weights"."""

    def __init__(self, model: Model, allocator: Allocator, machine: Machine) -> None:
        with allocator.use_pool("weights"):
            self.tensors = [
                torch.empty(shape, dtype=torch.bfloat16, device=machine.device)
                for shape in model.shapes()
            ]
        for tensor in self.tensors:
            tensor.view(torch.int16).random_(-3000, 3000)
        self._sums = self._checksums()

    def kept(self) -> bool:
        """Whether the content is unchanged."""
        return self._checksums() == self._sums

    def change(self) -> None:
        """Change a little of each MiB, so that no part of an earlier backup holds the content."""
        for tensor in self.tensors:
            tensor.view(torch.int16).flatten()[:: MIB // 2] += 1
        self._sums = self._checksums()

    def _checksums(self) -> list[int]:
        return [checksum(tensor) for tensor in self.tensors]


def kv_cache(
    blocks: int, block_mib: int, allocator: Allocator, machine: Machine
) -> list[torch.Tensor]:
    """Blocks without content, in memory of tag "kv_cache"."""
    with allocator.use_pool("kv_cache"):
        return [
            torch.empty(block_mib * MIB, dtype=torch.uint8, device=machine.device)
            for _ in range(blocks)
        ]
