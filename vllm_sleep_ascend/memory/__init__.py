# SPDX-License-Identifier: Apache-2.0
"""Device memory of one process that can sleep: torch's pools, vLLM's backend, what is held.

The functions here are for a program of your own, with or without an engine beside it::

    from vllm_sleep_ascend import memory

    with memory.region("weights"):
        model = Model().to("npu")
    memory.sleep()  # the device's memory is free, the content is in host memory
    memory.wake()  # at the same addresses: every tensor is as it was

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
"""What tags of regions begin with. An engine in the same process leaves them alone."""


def region(tag: str = "weights") -> AbstractContextManager[None]:
    """What this thread allocates on the device inside can sleep, under this tag.

    Raises:
        SleepModeError: torch took memory elsewhere, which then cannot sleep.
    """
    from vllm_sleep_ascend.memory.pool import use_pool

    _memory()
    return use_pool(f"{PROGRAM}{tag}")


def sleep(*tags: str, discard: Iterable[str] = ()) -> None:
    """Give back the device memory of regions, all of it or none.

    Args:
        tags: whose content goes to host memory; if there are none, that of every region.
        discard: whose content is forgotten instead.

    Raises:
        ValueError: no region has such a tag.
        SleepModeError: it failed, and everything is as it was.
    """
    regions = status()
    actions: dict[str, Action] = dict.fromkeys(_known(tags or regions, regions), "offload")
    actions.update(dict.fromkeys(_known(discard, regions), "discard"))
    _memory().sleep("sleep", actions, "keep")


def wake(*tags: str) -> None:
    """Bring back these regions, or all, at their addresses: with their content, or with none where
    it was forgotten.

    Raises:
        ValueError: no region has such a tag.
        SleepModeError: it failed; what slept sleeps, and the call can be repeated.
    """
    regions = status()
    _memory().wake(_known(tags or regions, regions))


def status() -> "dict[str, TagUsage]":
    """Bytes of each region, by tag: what is awake or asleep, and what is held."""
    usage = _memory().usage().items()
    return {tag.removeprefix(PROGRAM): of for tag, of in usage if tag.startswith(PROGRAM)}


@cache
def _memory() -> "SleepingMemory":
    from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory

    return SleepingMemory()


def _known(tags: Iterable[str], regions: "Mapping[str, TagUsage]") -> list[str]:
    """The allocator's names of these tags, each of which has to be a region's."""
    tags = list(tags)
    for tag in tags:
        if tag not in regions:
            known = ", ".join(sorted(regions)) or "none yet: allocate inside memory.region(tag)"
            raise ValueError(f"no region has the tag {tag!r}; regions: {known}")
    return [f"{PROGRAM}{tag}" for tag in tags]
