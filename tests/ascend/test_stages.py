# SPDX-License-Identifier: Apache-2.0
"""Three pipeline stages beside vllm-ascend that share one communicator."""

from helpers.ascend_engine import engine_of_ranks
from helpers.engine import sleep_and_wake, tokens
from helpers.ranks import assert_all
from helpers.reference import PROMPTS, hf_greedy

TOKENS = 6


def test_stages_meet_before_their_first_message(tiny_model, monkeypatch):
    """The first message needs all three stages, and the third one arrives for the second only."""
    monkeypatch.setenv("P2P_HCCL_BUFFSIZE", "0")
    expected = hf_greedy(tiny_model, PROMPTS[:4], TOKENS)
    with engine_of_ranks(tiny_model, pipeline_parallel_size=3) as llm:
        assert tokens(llm, PROMPTS[:4], TOKENS) == expected
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm, PROMPTS[:4], TOKENS) == expected
            assert_all(llm, "RUNNING")
