# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: answers with counts of drafts, EAGLE heads, and models with a layer for it
(MTP)."""

from collections.abc import Mapping
from typing import Any

import torch

from helpers.engine import draft_counts, tokens
from helpers.models import make_model
from helpers.reference import PROMPTS

TOKENS = 16
SOME = PROMPTS[:4]

# Method, target, head, drafts in a row, the share of them that is accepted at least.
KINDS = {
    "eagle": ("tiny-llama", "tiny-llama-eagle", 3, 0.6),
    "eagle3": ("tiny-llama", "tiny-llama-eagle3", 3, 0.2),
    "mtp": ("tiny-deepseek-v3-mtp", None, 2, 0.5),
}


def options_of(kind: str) -> dict[str, Any]:
    _, head, in_a_row, _ = KINDS[kind]
    speculative = {"method": kind, "num_speculative_tokens": in_a_row}
    if head is not None:
        speculative["model"] = str(make_model(head))
    return {"speculative_config": speculative, "disable_log_stats": False}


def answer(llm: Any) -> tuple[list[list[int]], int, int]:
    """Tokens, the number of drafted tokens, and the number of accepted ones."""
    llm.reset_prefix_cache()
    before = draft_counts(llm)
    said = tokens(llm, SOME, TOKENS)
    drafted, taken = (new - old for new, old in zip(draft_counts(llm), before, strict=True))
    return said, drafted, taken


def assert_kept_by_level_2(llm: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Asleep and awake again, before any load, they have their content."""
    before = {name: tensor.cpu() for name, tensor in tensors.items()}
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    for name, tensor in tensors.items():
        assert torch.equal(tensor.cpu(), before[name]), name
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
