# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention with other options: types, ranks, 8-bit weights, draft models."""

import pytest
from helpers.engine import driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.ranks import assert_tokens_survive_sleep
from helpers.reference import PROMPTS, hf_greedy, hf_lead, round_weights

SOME = PROMPTS[1:7:2]
ROUNDING = 0.2
"""Of the best logit, in bfloat16; logits have a deviation of 2."""


@pytest.mark.parametrize("name", ["tiny-deepseek-v2-lite", "tiny-deepseek-v2", "tiny-deepseek-v3"])
def test_sixteen_bits(name):
    model = make_model(name)
    with engine(model, dtype="bfloat16", enable_sleep_mode=True) as llm:
        before = tokens(llm)
        assert hf_lead(model, before) < ROUNDING
        same = [answer == want for answer, want in zip(before, hf_greedy(model), strict=True)]
        assert sum(same) > len(same) / 2
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm) == before, f"after level {level}"


def test_quantised_weights():
    """Rounded weights cannot be viewed: the derived matrices have memory of their own here."""
    model = make_model("tiny-deepseek-v2")
    with engine(model, enable_sleep_mode=True, dtype="float16", quantization="fp8") as llm:
        before = tokens(llm)
        assert hf_lead(model, before, change=round_weights) < ROUNDING
        layers = driver_worker(llm).model_runner.get_model().model.layers
        derived = [layer.self_attn.mla_attn.mla_attn.W_UV for layer in layers]
        addresses = [matrix.data_ptr() for matrix in derived]
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm) == before, f"after level {level}"
            assert [matrix.data_ptr() for matrix in derived] == addresses


def test_two_ranks():
    """Each has half of the heads, and the experts' halves."""
    model = make_model("tiny-deepseek-v3")
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(model, enable_sleep_mode=True, **ranks) as llm:
        assert_tokens_survive_sleep(llm, model)


def test_with_a_draft_model():
    model, draft = make_model("tiny-deepseek-v2"), make_model("tiny-qwen2-draft")
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with engine(model, enable_sleep_mode=True, speculative_config=speculative) as llm:
        assert tokens(llm) == hf_greedy(model)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm, SOME) == hf_greedy(model, SOME), f"after level {level}"
