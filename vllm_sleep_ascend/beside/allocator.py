# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's ``CaMemAllocator`` on top of our compiled allocator."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.backend import CamemBackend
from vllm_sleep_ascend.memory.pool import use_pool
from vllm_sleep_ascend.policy import Action

_WORKER = "vllm_ascend.worker.worker"


class SleepingAllocator:
    """vllm-ascend's interface of an allocator, with each operation a transaction.

    Unlike vllm-ascend's own, it works with expandable segments, which are off inside its pools.
    A tag nested in another one has segments of its own.
    """

    instance: ClassVar["SleepingAllocator | None"] = None
    default_tag: str = "default"
    sleep_persistent_tag: str = "sleep_persistent"

    def __init__(self) -> None:
        self.backend = CamemBackend()
        self._inside = 0

    @classmethod
    def get_instance(cls) -> Self:
        """The allocator of this process."""
        if cls.instance is None:
            cls.instance = cls()
        return cls.instance  # type: ignore[return-value]

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        """Allocate device memory inside under ``tag``, so that it can sleep.

        Raises:
            TypeError: the tag is not a string.
        """
        tag = self.default_tag if tag is None else tag
        if not isinstance(tag, str):
            raise TypeError(f"tag {tag!r} must be a string")
        self._inside += 1
        try:
            with use_pool(tag):
                yield
        finally:
            self._inside -= 1

    @contextmanager
    def use_allocation_tag(self, tag: str) -> Iterator[None]:
        """Use another tag inside. Outside a memory pool this does nothing."""
        if not self._inside:
            yield
            return
        with self.use_memory_pool(tag):
            yield

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        """Offload these tags (by default ``default``), keep ``sleep_persistent``, discard the rest.

        Raises:
            SleepModeError: it failed. Memory is mapped as before; discarded tags have no content.
        """
        if offload_tags is None:
            offload_tags = (self.default_tag,)
        elif isinstance(offload_tags, str):
            offload_tags = (offload_tags,)
        actions: dict[str, Action] = dict.fromkeys(offload_tags, "offload")
        actions[self.sleep_persistent_tag] = "keep"
        self.backend.sleep(
            f"sleep, offload {', '.join(offload_tags) or 'nothing'}", actions, "discard"
        )

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Restore these tags, or all.

        Raises:
            SleepModeError: it failed. The tags still sleep, and the call can be retried.
        """
        known = self.backend.tags()
        self.backend.wake([tag for tag in known if tags is None or tag in tags])

    def get_current_usage(self) -> int:
        """Bytes of all allocations, asleep or awake."""
        tags = self.backend.usage().values()
        return sum(tag["mapped"] + tag["offloaded"] + tag["discarded"] for tag in tags)


def install() -> None:
    """Replace vllm-ascend's allocator by ours. Calling it again does nothing.

    Raises:
        SleepModeError: vllm-ascend's own allocator is in use in this process.
    """
    from vllm_ascend.device_allocator import camem

    stock = camem.CaMemAllocator
    if stock is SleepingAllocator:
        return
    if stock.instance is not None:
        raise SleepModeError(
            "an engine of this process uses vllm-ascend's own sleep mode: shut it down, and "
            "start this one in a process of its own"
        )
    camem.CaMemAllocator = SleepingAllocator
    if _WORKER in sys.modules:  # imported for an engine without sleep mode
        sys.modules[_WORKER].CaMemAllocator = SleepingAllocator  # type: ignore[attr-defined]
