# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend in its default mode: compiled, with captured graphs, on two ranks.

There are few capture sizes, to save time. Engines run in separate processes, because compiled code
keeps the model and its memory alive in its process.
"""

from typing import Any

import pytest
from helpers.ascend_engine import engine_of_ranks
from helpers.engine import sleep_and_wake, tokens
from helpers.reference import PROMPTS, hf_greedy

SIZES = [1, 2, 4, 8]
LAYERS = 4
TOKENS = 8
RANKS = 2


def calls(_worker: Any) -> tuple[int, int]:
    """Captures and executions of a worker's process."""
    from vllm_sleep_ascend.sim import control

    return control.call_count("aclmdlRICaptureBegin"), control.call_count("aclmdlRIExecuteAsync")


@pytest.mark.parametrize(
    ("mode", "graphs", "clean_up"),
    [
        # Pieces around each layer's attention, and whole graphs for decoding.
        ("FULL_AND_PIECEWISE", len(SIZES) * (LAYERS + 1) + len(SIZES), False),
        # Compiled by npugraph_ex. The clean-up destroys communicators, so it drops the graphs.
        ("FULL_DECODE_ONLY", len(SIZES), True),
    ],
)
def test_graphs_give_the_same_tokens_before_and_after_sleep(
    tiny_model, mode: str, graphs: int, clean_up: bool
) -> None:
    expected = hf_greedy(tiny_model, PROMPTS, TOKENS)
    compilation = {"cudagraph_capture_sizes": SIZES}
    if mode != "FULL_AND_PIECEWISE":  # the default
        compilation["cudagraph_mode"] = mode
    with engine_of_ranks(
        tiny_model,
        tensor_parallel_size=RANKS,
        enforce_eager=False,
        compilation_config=compilation,
        additional_config={"enable_sleep_mode_extra_cleanup": clean_up},
    ) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name == mode
        assert llm.collective_rpc(calls) == [(graphs, 0)] * RANKS
        assert tokens(llm, PROMPTS, TOKENS) == expected
        assert all(executed >= TOKENS - 1 for _, executed in llm.collective_rpc(calls))
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            assert tokens(llm, [prompt], TOKENS) == [answer]
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm, PROMPTS, TOKENS) == expected
            captured = graphs * (level + 1 if clean_up else 1)
            assert [count for count, _ in llm.collective_rpc(calls)] == [captured] * RANKS
