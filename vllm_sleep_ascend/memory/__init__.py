# SPDX-License-Identifier: Apache-2.0
"""This process's device memory that can sleep: torch's pools, vLLM's backend, accounting.

The functions here are for your own programs, with or without an engine beside them::

    from vllm_sleep_ascend import memory

    with memory.region("weights"):
        model = Model().to("npu")
    memory.sleep()  # the device memory is free, the content is in host memory
    memory.wake()  # every tensor is as before, at the same address

See docs/memory.md.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory
    from vllm_sleep_ascend.policy import Action
    from vllm_sleep_ascend.status import TagUsage


PROGRAM = "program:"
"""The prefix of regions' tags. An engine in the same process leaves them alone."""


def region(tag: str = "weights") -> AbstractContextManager[None]:
    """Allocations of this thread inside can sleep, under this tag.

    Raises:
        SleepModeError: torch allocated memory elsewhere, which cannot sleep.
    """
    from vllm_sleep_ascend.memory.pool import use_pool

    _memory()
    return use_pool(f"{PROGRAM}{tag}")


def sleep(*tags: str, discard: Iterable[str] = ()) -> None:
    """Free the device memory of regions, all of it or none.

    Args:
        tags: regions to offload to host memory; by default all.
        discard: regions whose content is discarded instead.

    Raises:
        ValueError: no region has such a tag.
        SleepModeError: it failed, and everything is as before.
    """
    regions = status()
    actions: dict[str, Action] = dict.fromkeys(_known(tags or regions, regions), "offload")
    actions.update(dict.fromkeys(_known(discard, regions), "discard"))
    _memory().sleep("sleep", actions, "keep")


def wake(*tags: str) -> None:
    """Restore these regions, or all, at their addresses; discarded ones have no content.

    Raises:
        ValueError: no region has such a tag.
        SleepModeError: it failed. The regions still sleep, and the call can be retried.
    """
    regions = status()
    _memory().wake(_known(tags or regions, regions))


def status() -> "dict[str, TagUsage]":
    """Bytes of each region by tag: awake, asleep, and held."""
    usage = _memory().usage().items()
    return {tag.removeprefix(PROGRAM): of for tag, of in usage if tag.startswith(PROGRAM)}


@cache
def _memory() -> "SleepingMemory":
    from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory

    return SleepingMemory()


def _known(tags: Iterable[str], regions: "Mapping[str, TagUsage]") -> list[str]:
    """The allocator's tags for these regions, which must exist."""
    tags = list(tags)
    for tag in tags:
        if tag not in regions:
            known = ", ".join(sorted(regions)) or "none yet: allocate inside memory.region(tag)"
            raise ValueError(f"no region has the tag {tag!r}; regions: {known}")
    return [f"{PROGRAM}{tag}" for tag in tags]
