# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's ``CaMemAllocator``, over the compiled allocator."""

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
    """What vllm-ascend asks of its allocator, each operation a transaction.

    Unlike vllm-ascend's it can be used with expandable segments, which pause inside its pools, and
    a tag within another has segments of its own.
    """

    instance: ClassVar["SleepingAllocator | None"] = None
    default_tag: str = "default"
    sleep_persistent_tag: str = "sleep_persistent"

    def __init__(self) -> None:
        self.backend = CamemBackend()
        self._inside = 0

    @classmethod
    def get_instance(cls) -> Self:
        """The one of this process."""
        if cls.instance is None:
            cls.instance = cls()
        return cls.instance  # type: ignore[return-value]

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        """Give device memory that is allocated inside to sleep mode, under ``tag``.

        Raises:
            TypeError: the tag is no string.
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
        """Another tag for what is allocated inside; outside a memory pool, nothing."""
        if not self._inside:
            yield
            return
        with self.use_memory_pool(tag):
            yield

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        """Free all memory but ``sleep_persistent``: offload these tags, by default ``default``, and
        discard the others.

        Raises:
            SleepModeError: it failed; memory is mapped as it was, discarded tags without content.
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
        """Bring back these tags, or all.

        Raises:
            SleepModeError: it failed; what slept still sleeps, and the call can be repeated.
        """
        known = self.backend.tags()
        self.backend.wake([tag for tag in known if tags is None or tag in tags])

    def get_current_usage(self) -> int:
        """Bytes of all allocations, asleep or awake."""
        tags = self.backend.usage().values()
        return sum(tag["mapped"] + tag["offloaded"] + tag["discarded"] for tag in tags)


def install() -> None:
    """Put our allocator in the place of vllm-ascend's. Repeating it changes nothing.

    Raises:
        SleepModeError: vllm-ascend's own is in use in this process.
    """
    from vllm_ascend.device_allocator import camem

    stock = camem.CaMemAllocator
    if stock is SleepingAllocator:
        return
    if stock.instance is not None:
        raise SleepModeError(
            "an engine of this process has vllm-ascend's own sleep mode on: shut it down, and "
            "start this one in a process of its own"
        )
    camem.CaMemAllocator = SleepingAllocator
    if _WORKER in sys.modules:  # an engine without sleep mode ran before; it has the name by value
        sys.modules[_WORKER].CaMemAllocator = SleepingAllocator  # type: ignore[attr-defined]
