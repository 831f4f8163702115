# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM on the NPU gives Hugging Face's tokens before and after sleep."""

import pytest
from helpers.engine import driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.reference import MAX_NUM_BATCHED_TOKENS, PROMPTS, assert_greedy, hf_greedy, tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["prefix caching", "no prefix caching"])
def llm(request, tiny_model):
    with engine(tiny_model, enable_prefix_caching=request.param) as llm:
        yield llm


def test_the_prompts_cover_what_they_should(tiny_model):
    lengths = [len(tokenizer(tiny_model)(prompt).input_ids) for prompt in PROMPTS]
    assert len(set(lengths)) >= 8
    assert max(lengths) > 2 * MAX_NUM_BATCHED_TOKENS, "no prompt is long enough to come in chunks"
    answers = hf_greedy(tiny_model)
    assert all(len(set(answer)) > len(answer) // 2 for answer in answers), "answers repeat a token"


def test_batched(llm, tiny_model):
    assert tokens(llm) == hf_greedy(tiny_model)


def test_one_by_one(llm, tiny_model):
    """The second pass uses the first one's prefix cache."""
    for prompt, expected in zip(PROMPTS, hf_greedy(tiny_model), strict=True):
        assert tokens(llm, [prompt]) == [expected]


def test_common_prefix(llm, tiny_model):
    """Prompts with a common prefix share blocks of the prefix cache."""
    prompts = [PROMPTS[-1] + end for end in ("", "And", "And then the end.")]
    assert tokens(llm, prompts) == hf_greedy(tiny_model, prompts)


def assert_caches_are_contiguous(llm):
    """Tokens must be contiguous, otherwise the NPU's index operators copy a layer's cache."""
    runner = driver_worker(llm).model_runner
    assert runner.cache_config.kv_cache_layout == "LBNHC"
    assert runner.kv_caches
    assert all(cache.transpose(1, 2).is_contiguous() for cache in runner.kv_caches)


@pytest.mark.parametrize(
    "name,options",
    [
        pytest.param("tiny-llama", {}, marks=pytest.mark.slow),
        ("tiny-gemma2", {}),
        pytest.param(
            "tiny-gemma2", {"disable_hybrid_kv_cache_manager": True}, marks=pytest.mark.slow
        ),
        pytest.param("tiny-mistral", {}, marks=pytest.mark.slow),
        ("tiny-qwen3-moe", {}),
        ("tiny-llama", {"block_size": 8, "async_scheduling": False}),
    ],
    ids=[
        "llama",
        "gemma2",
        "gemma2 in one cache group",
        "mistral",
        "qwen3 moe",
        "synchronous, small blocks",
    ],
)
def test_other_models(name, options):
    """Sliding window, soft cap, experts; other block sizes; scheduling one step at a time.

    Before sleep, and after each level with fewer prompts.
    """
    model = make_model(name)
    few = PROMPTS[1:7:2]
    with engine(model, enable_sleep_mode=True, **options) as llm:
        assert_caches_are_contiguous(llm)
        assert tokens(llm) == hf_greedy(model)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert tokens(llm, few) == hf_greedy(model, few), f"after level {level}"


ATTENDS, WRITES = "npu::npu_fused_infer_attention_score", "atb::_npu_reshape_and_cache"


@pytest.mark.parametrize(
    "name,options",
    [
        ("tiny-qwen3", {}),
        ("tiny-qwen3", {"block_size": 128, "enable_prefix_caching": False}),
        ("tiny-mistral", {}),
        pytest.param("tiny-qwen2", {}, marks=pytest.mark.slow),
    ],
    ids=["heads of 64", "large blocks", "a sliding window", "heads of 32"],
)
def test_sixteen_bits(name, options):
    """NPU operators attend in each step, or decode if the heads have another size."""
    from vllm_sleep_ascend.sim import control

    model = make_model(name)
    few = PROMPTS[1:7:2]
    with engine(model, dtype="bfloat16", enable_sleep_mode=True, **options) as llm:
        control.reset_counters()
        answers = tokens(llm)
        attends, writes = control.call_count(ATTENDS), control.call_count(WRITES)
        assert 0 < attends <= writes and (attends == writes) == (name != "tiny-qwen2")
        assert_greedy(model, answers)
        same = [answer == want for answer, want in zip(answers, hf_greedy(model), strict=True)]
        assert sum(same) > len(same) / 2
        for prompt in few:
            assert_greedy(model, tokens(llm, [prompt]), [prompt])  # from the cache
        before = tokens(llm, few)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert tokens(llm, few) == before, f"after level {level}"


def test_many_more_requests_than_fit_a_step(llm, tiny_model):
    prompts = [f"{i} {PROMPTS[i % 5]}" for i in range(40)]
    assert tokens(llm, prompts, n=8) == hf_greedy(tiny_model, prompts, n=8)
