# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Triton kernels that vllm-ascend launches on an NPU whatever the model.

Triton for Ascend cannot be had without its compiler. A stand-in takes its kernel's place in the
modules that launch it, as they are imported.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
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


STAND_INS: dict[str, dict[str, Callable[..., None]]] = {
    "vllm_ascend.worker.block_table": {"_compute_slot_mapping_kernel": compute_slot_mapping},
}


class _Patched(importlib.abc.Loader):
    def __init__(self, loader: Any, kernels: dict[str, Callable[..., None]]) -> None:
        self.loader, self.kernels = loader, kernels

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for name, run in self.kernels.items():
            if not hasattr(module, name):
                raise ImportError(f"{module.__name__} has no {name}: its stand-in is outdated")
            setattr(module, name, Kernel(run))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in STAND_INS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Patched(spec.loader, STAND_INS[name])
        return spec


def install() -> None:
    """From now on, importing one of the modules gives it its stand-ins."""
    sys.meta_path.insert(0, _Finder())
