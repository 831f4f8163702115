# SPDX-License-Identifier: Apache-2.0
"""What the releases of vLLM that this package supports do differently, where that is more than an
attribute that one of them lacks.

Callables that are replaced have their releases in patches.py.
"""

from collections.abc import Iterator
from typing import Any

import torch


def full_weights(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All that this rank holds of a trainer's WeightSource, each parameter whole."""
    # vLLM 0.33 has iter_full() and iter_local(); 0.32 iterates the source itself.
    return iter(source.iter_full() if hasattr(source, "iter_full") else source)


def held_elsewhere(source: Any, rank: int) -> list[str]:
    """Parameters of a WeightSource that this rank of the trainer does not hold."""
    # vLLM 0.33 has metadata as a property and owned_names(); 0.32 has two methods.
    metadata = source.metadata() if callable(source.metadata) else source.metadata
    held = source.owned_names(rank) if hasattr(source, "owned_names") else source.held_names()
    return [] if held is None else sorted({meta.name for meta in metadata} - {*held})
