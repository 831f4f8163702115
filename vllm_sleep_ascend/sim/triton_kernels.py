# SPDX-License-Identifier: Apache-2.0
"""Replacements for Triton kernels that vllm-ascend launches on an NPU for every model.

Triton for Ascend needs its compiler, which is not simulated. A kernel is replaced when the module
that launches it is imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


class Kernel:
    """Can be launched as ``kernel[grid](...)``."""

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
    """Write each token's cache slot, and ``PAD_ID`` after the last token."""
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
    """Replace the kernel after the module's body has run."""
    yield
    name = "_compute_slot_mapping_kernel"
    if not hasattr(module, name):
        raise ImportError(f"{module.__name__} has no {name}: its replacement is outdated")
    setattr(module, name, Kernel(compute_slot_mapping))
