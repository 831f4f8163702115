# SPDX-License-Identifier: Apache-2.0
"""Memory pools whose allocations can sleep: ``with use_pool("weights"): torch.empty(...)``.

torch's caching allocator gets segments from the compiled allocator (``_camem``) only inside
``use_pool``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypedDict

import torch_npu

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.policy import GRAPHS


class Block(TypedDict):
    """A part of a segment: in use, or free."""

    address: int
    requested_size: int
    state: str  # "active_allocated": a tensor's


class Segment(TypedDict):
    """A torch allocation from the allocator: the fields of MemPool.snapshot() that are used."""

    address: int
    total_size: int
    allocated_size: int  # in tensors
    active_size: int  # in tensors, and what a stream may still use
    blocks: list[Block]


# Each entry into a tag gets a new torch MemPool, and none is entered twice. So memory of a segment
# that torch no longer uses can be freed without torch.
_pools: list[torch_npu.npu.MemPool] = []
# The pool of captured graphs. They use memory of it that torch deems free, so it is not trimmed.
_graph_pool: torch_npu.npu.MemPool | None = None

_EXPANDABLE = "expandable_segments"


@cache
def _allocator() -> torch_npu.npu.memory.NPUPluggableAllocator:
    """Kept for ever, because pools call it when they are destroyed."""
    return torch_npu.npu.memory.NPUPluggableAllocator(_camem.__file__, "camem_malloc", "camem_free")


@contextmanager
def use_pool(tag: str) -> Iterator[None]:
    """Device memory that this thread allocates inside can sleep, under ``tag``.

    Pools nest, and the inner one wins. Other threads are not affected.

    Raises:
        SleepModeError: torch allocated memory elsewhere, which cannot sleep.
    """
    torch_npu.npu.init()
    previous_tag = _camem.set_current_tag(tag)
    try:
        with _expandable_segments_off():
            pool = torch_npu.npu.MemPool(_allocator()._allocator)
            try:
                with torch_npu.npu.use_mem_pool(pool):
                    yield
            finally:
                _pools.append(pool)  # closed from here on, so that trim() may look at it
    finally:
        _camem.set_current_tag(previous_tag)
    _check_owned(pool, tag)
    trim()


@contextmanager
def use_graph_pool() -> Iterator[tuple[int, int]]:
    """The id of the pool for ``torch.npu.graph(pool=...)``. What a graph that is captured inside
    allocates can sleep, under vLLM's tag for it; all graphs share the pool."""
    global _graph_pool
    torch_npu.npu.init()
    previous_tag = _camem.set_current_tag(GRAPHS)
    try:
        with _expandable_segments_off():
            if _graph_pool is None:
                _graph_pool = torch_npu.npu.MemPool(_allocator()._allocator)
            pool = _graph_pool
            yield pool.id
    finally:
        _camem.set_current_tag(previous_tag)
    _check_owned(pool, GRAPHS)


def trim() -> int:
    """Free the memory of segments without tensors. Returns bytes."""
    wait_for_device()
    unused = {
        segment["address"]
        for segment in _segments()
        if segment["allocated_size"] == 0 and segment["active_size"] == 0
    }
    return _camem.trim(unused) if unused else 0


def blocks() -> dict[int, list[tuple[int, int]]]:
    """Address and bytes of each tensor storage in the pools, awake or asleep, by the address of its
    segment."""
    return {
        segment["address"]: [
            (block["address"], block["requested_size"])
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ]
        for segment in _segments()
    }


def _segments() -> Iterator[Segment]:
    for pool in _pools:
        yield from _snapshot(pool)


def _snapshot(pool: torch_npu.npu.MemPool) -> list[Segment]:
    segments: list[Segment] = pool.snapshot()
    return segments


def release_pools() -> None:
    """Destroy the pools: segments without tensors are freed now, others with their last tensor.

    The host memory that was prepared for their next sleep is freed as well, in the background.
    """
    global _graph_pool
    _pools.clear()
    _graph_pool = None
    _camem.release_prepared()


def _check_owned(pool: torch_npu.npu.MemPool, tag: str) -> None:
    owned = {allocation["address"] for allocation in _camem.allocations()}
    foreign = [segment for segment in _snapshot(pool) if segment["address"] not in owned]
    if foreign:
        raise SleepModeError(
            f"{sum(segment['total_size'] for segment in foreign)} bytes of tag {tag!r} were not "
            f"allocated by sleep mode and cannot sleep; was {_EXPANDABLE} switched on at run time? "
            f"Leave {_EXPANDABLE} out of the allocator settings"
        )


def _configured_settings() -> str:
    return os.environ.get("PYTORCH_NPU_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""


@contextmanager
def _expandable_segments_off() -> Iterator[None]:
    """torch_npu's expandable segments bypass pools, so they are off inside one.

    A setting replaces all others, so the whole string is set each time.
    """
    settings = _configured_settings()
    fields = [field.strip() for field in settings.split(",") if field.strip()]
    names = [field.partition(":")[0].strip() for field in fields]
    if _EXPANDABLE not in names:
        yield
        return
    fields[names.index(_EXPANDABLE)] = f"{_EXPANDABLE}:False"
    torch_npu.npu.memory._set_allocator_settings(",".join(fields))
    try:
        yield
    finally:
        torch_npu.npu.memory._set_allocator_settings(settings)
