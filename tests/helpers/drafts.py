# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: answers with counts of drafts, EAGLE heads, and models with a layer for it
(MTP)."""

from typing import Any

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
