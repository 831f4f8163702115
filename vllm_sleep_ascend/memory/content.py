# SPDX-License-Identifier: Apache-2.0
"""The content of this process's allocations that can sleep, awake or not. Needs no vLLM."""

from typing import ClassVar

import torch
import torch_npu

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory import pool
from vllm_sleep_ascend.memory.checksum import memory_at


class SleepingContent:
    """Reads and writes it by address, and keeps what level 2 has to save of it."""

    _saved: ClassVar[list[tuple[int, torch.Tensor]] | None] = None

    @property
    def saved(self) -> list[tuple[int, torch.Tensor]] | None:
        """What level 2 keeps of discarded memory, by address; None while nothing is kept. It
        outlives an engine that ends asleep."""
        return SleepingContent._saved

    @saved.setter
    def saved(self, content: list[tuple[int, torch.Tensor]] | None) -> None:
        SleepingContent._saved = content

    def ranges(self, tag: str) -> list[tuple[int, int]]:
        """Address and bytes of each allocation of this tag, awake or asleep."""
        return [(a["address"], a["bytes"]) for a in _camem.allocations() if a["tag"] == tag]

    def blocks(self, tag: str) -> list[tuple[int, int]]:
        """Address and bytes of torch's allocations in this tag's memory, and of all memory that an
        ended engine left there."""
        of_pools = pool.blocks()
        return [
            block
            for a in _camem.allocations()
            if a["tag"] == tag and a["state"] != "trimmed"
            for block in of_pools.get(a["address"], [(a["address"], a["bytes"])])
        ]

    def read(self, address: int, size: int) -> torch.Tensor:
        """A copy of memory as bytes on the host; for sleeping memory, from its backup.

        Raises:
            SleepModeError: the memory sleeps, and its backup cannot be read.
        """
        content = _camem.read_backup(address, size)
        if content is not None:
            return torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for a in _camem.allocations():
            if holds(a, address) and a["state"] != "mapped":
                raise SleepModeError(
                    f"memory of tag {a['tag']!r} sleeps and cannot be read; call wake_up() first"
                )
        return memory_at(address, size, torch.uint8, current_device()).cpu()

    def write(self, address: int, content: torch.Tensor) -> None:
        """Copy bytes back to where ``read`` got them. The memory must be awake."""
        memory_at(address, content.nbytes, torch.uint8, current_device()).copy_(content)


def current_device() -> torch.device:
    """The device of this process, as torch names it."""
    return torch.device("npu", torch_npu.npu.current_device())


def holds(allocation: "_camem.AllocationInfo", address: int) -> bool:
    """Whether the address is in it."""
    return 0 <= address - allocation["address"] < allocation["bytes"]
