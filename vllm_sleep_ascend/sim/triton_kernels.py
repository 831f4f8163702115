# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Triton kernels that vllm-ascend launches on an NPU whatever the model.

Triton for Ascend is nothing without its compiler. A stand-in takes its kernel's place in the module
that launches it, as that is imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


class Kernel:
    """Launched as ``kernel[grid](...)``."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.run


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    slot_mapping: torch.Tensor,
    TOTAL_CP_WORLD_SIZE: int,
    PAD_ID: int,
    **_: Any,
) -> None:
    """Each token's slot in the cache; ``PAD_ID`` after the last token."""
    if TOTAL_CP_WORLD_SIZE != 1:
        raise NotImplementedError("slots of a context-parallel cache are not simulated")
    counts = query_start_loc[1:] - query_start_loc[:-1]
    tokens = int(query_start_loc[-1])
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    at = positions[:tokens]
    blocks = block_table[rows, at // block_size]
    slot_mapping[:tokens] = blocks * block_size + at % block_size
    slot_mapping[tokens:max_num_tokens] = PAD_ID


@contextmanager
def slot_mapping(module: ModuleType) -> Iterator[None]:
    """After the module's body, it launches the stand-in."""
    yield
    name = "_compute_slot_mapping_kernel"
    if not hasattr(module, name):
        raise ImportError(f"{module.__name__} has no {name}: its stand-in is outdated")
    setattr(module, name, Kernel(compute_slot_mapping))
