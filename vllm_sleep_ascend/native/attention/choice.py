# SPDX-License-Identifier: Apache-2.0
"""Which of ``fused`` is used for a layer: what its documents allow and works on this device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import nan
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_sleep_ascend.native.attention.fused import (
    Batch,
    Layer,
    Layout,
    attend,
    causal_mask,
    write,
)
from vllm_sleep_ascend.native.attention.kv_cache import Rows, halves, write_kv
from vllm_sleep_ascend.native.attention.paged import Rules, paged_attention
from vllm_sleep_ascend.native.attention.tiles import make_tile, plan_tiles
from vllm_sleep_ascend.native.dense.operators import CHIPS, problem_of

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

_Trial = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]
"""The operator, PyTorch's version of it, and arguments for both."""


@dataclass(frozen=True)
class Choice:
    """What is used for a layer, on this process's device."""

    layout: Layout | None = None
    """None: PyTorch attends."""
    writes: bool = False
    """Whether ``write`` is used."""


_choices: dict[tuple[torch.device, Layer], Choice] = {}


def choose(device: torch.device, layer: Layer) -> Choice:
    """Try the operators once for each kind of layer, and use those whose results are PyTorch's.

    Args:
        device: this process's NPU.
        layer: the layer.
    """
    if (device, layer) not in _choices:
        _choices[device, layer] = _choose(device, layer)
    return _choices[device, layer]


def _choose(device: torch.device, layer: Layer) -> Choice:
    kind = (
        f"{layer.heads} heads of {layer.head_size} over {layer.kv_heads} in {layer.dtype}, "
        f"blocks of {layer.block_size}, window {layer.window}"
    )
    chip = current_platform.get_device_name(device.index)
    documented = list(layer.layouts())
    if not documented or not chip.startswith(CHIPS) or envs.VLLM_BATCH_INVARIANT:
        logger.info("NPU: PyTorch computes attention on %s (%s)", chip, kind)
        return Choice()
    no_write = problem_of(*_trial_of_write(device, layer))
    if no_write:
        _warn("_npu_reshape_and_cache", kind, no_write)
    size, problem = layer.block_size, ""
    decode = (1, size - 1), (1, size), (1, 0), (1, size + 8)  # new tokens, and earlier ones
    mixed = (*decode, (5, 0), (3, size + 8))
    for layout in documented:
        problem = problem_of(*_trial(device, layer, layout, decode))
        if not problem and layout is Layout.TND:
            problem = problem_of(*_trial(device, layer, layout, mixed))
        if not problem:
            return Choice(layout, not no_write)
    _warn("npu_fused_infer_attention_score", kind, problem)
    return Choice(None, not no_write)


def _warn(operator: str, kind: str, problem: str) -> None:
    logger.warning(
        "NPU: %s is not used, and PyTorch computes instead (%s): %s", operator, kind, problem
    )


def _trial_of_write(device: torch.device, layer: Layer) -> _Trial:
    """With padding, and values that are parts of wider rows, as they come from a model."""
    key, pair = (
        _random(3, layer.kv_heads, layer.head_size),
        _random(3, layer.kv_heads, layer.head_size, 2),
    )
    cache = torch.zeros(3, layer.kv_heads, layer.block_size, 2 * layer.head_size)
    slots = torch.tensor([2 * layer.block_size, -1, layer.block_size + 1])

    def run(
        write: Callable[..., None], cache: torch.Tensor, key: torch.Tensor, pair: torch.Tensor
    ) -> torch.Tensor:
        both = halves(cache, layer.head_size)
        assert both is not None
        write(both, cache, key, pair[..., 0], Rows(slots.to(cache.device), layer.block_size))
        return both[2:]  # the null block may hold anything

    def ours(both: torch.Tensor, _: torch.Tensor, *tokens: Any) -> None:
        write(both, *tokens)

    def plain(_: torch.Tensor, *tokens: Any) -> None:
        write_kv(*tokens)

    on_device = tuple(t.to(device, layer.dtype) for t in (cache, key, pair))
    return partial(run, ours), partial(run, plain), on_device


def _trial(
    device: torch.device, layer: Layer, layout: Layout, requests: tuple[tuple[int, int], ...]
) -> _Trial:
    """Lengths at the borders of blocks, blocks not in order, and NaN wherever the operator need not
    look: nobody clears a new cache, and the null block takes the place of what a window has left.
    """
    size = layer.block_size
    # A window that hides something, whatever the layer's is.
    layer = replace(layer, window=None if layer.window is None else min(layer.window, 4))
    lengths = [new + earlier for new, earlier in requests]
    ends = list(accumulate(new for new, _ in requests))
    table, first = torch.zeros(len(requests), 3, dtype=torch.int32), 1 + 2 * len(requests)
    cache = torch.full((first, 2 * layer.head_size * layer.kv_heads * size), nan)
    both = halves(cache.view(first, layer.kv_heads, size, -1), layer.head_size)
    assert both is not None
    for row, (length, (_, earlier)) in enumerate(zip(lengths, requests, strict=True)):
        unseen = 0 if layer.window is None else max(0, earlier - layer.window + 1) // size
        for place in range(unseen, -(-length // size)):
            table[row, place] = first = first - 1
            tokens = min(size, length - place * size)
            both[2 * first : 2 * first + 2, :tokens] = _random(
                2, tokens, layer.kv_heads, layer.head_size, seed=first
            )
    # Scores that set keys apart.
    spread = 4 / (layer.scale * layer.head_size**0.5)
    query = spread * _random(ends[-1], layer.heads, layer.head_size)

    def ours(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        both = halves(cache, layer.head_size)
        assert both is not None
        batch = Batch(ends, lengths, table, causal_mask(device), size)
        attend(layer, layout, query, both, output, batch)
        return output

    def plain(query: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        new = [count for count, _ in requests]
        plans = plan_tiles(
            new,
            lengths,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            content=2 * layer.head_size,
            window=layer.window,
        )
        starts = torch.tensor([0, *ends])
        tiles = [
            make_tile(plan, new, starts, torch.tensor(lengths), table, layer.window)
            for plan in plans
        ]
        rules = Rules(layer.scale, layer.head_size, window=layer.window)
        paged_attention(query, cache, output, tiles, rules)
        return output

    cache = cache.view(-1, layer.kv_heads, size, 2 * layer.head_size)
    on_device = query.to(device, layer.dtype), cache.to(device, layer.dtype), table.to(device)
    return ours, plain, on_device


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
