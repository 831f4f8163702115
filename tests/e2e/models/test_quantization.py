# SPDX-License-Identifier: Apache-2.0
"""8-bit weights: half the memory, and the tokens of a model with the same rounded weights."""

import pytest
import torch
from helpers.engine import driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.reference import PROMPTS, hf_greedy, round_weights
from vllm import SamplingParams

TOKENS = 8
SOME = PROMPTS[:5]


def weight_bytes(llm):
    """Device bytes of the tag ``weights``."""
    return driver_worker(llm).sleep_status()["tags"]["weights"]["device"]


def logprobs(llm):
    """Log-probabilities of each prompt's tokens."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    values = []
    for answer in llm.generate(list(SOME), params, use_tqdm=False):
        values += [next(iter(of.values())).logprob for of in answer.prompt_logprobs[1:]]
    return torch.tensor(values)


def test_experts():
    # Comes first, because the fixture below keeps its engine, and a process can have only one.
    model = make_model("tiny-qwen3-moe")
    expected = hf_greedy(model, SOME, TOKENS, change=round_weights)
    with engine(model, enable_sleep_mode=True, dtype="float16", quantization="fp8") as llm:
        assert tokens(llm, SOME, TOKENS) == expected
        experts = driver_worker(llm).model_runner.model.model.layers[0].mlp.experts
        assert {p.dtype for n, p in experts.named_parameters() if n.endswith("_weight")} == {
            torch.int8
        }
        sleep_and_wake(llm, 2)
        assert tokens(llm, SOME, TOKENS) == expected


@pytest.fixture(scope="module")
def model():
    return make_model("small-qwen2")


@pytest.fixture(scope="module")
def plain(model):
    """Bytes and log-probabilities of the unquantised model."""
    with engine(model, enable_sleep_mode=True, dtype="float16") as llm:
        return weight_bytes(llm), logprobs(llm)


@pytest.fixture(scope="module")
def llm(model, plain):
    with engine(model, enable_sleep_mode=True, dtype="float16", quantization="fp8") as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(model):
    return hf_greedy(model, SOME, TOKENS, change=round_weights)


def test_weights_take_half_the_memory(llm, plain):
    parameters = dict(driver_worker(llm).model_runner.model.named_parameters())
    quantised = {name: p for name, p in parameters.items() if p.dtype == torch.int8}
    assert len(quantised) == 4 * 4  # qkv, o, gate_up, down in four layers
    assert all(p.element_size() == 2 for n, p in parameters.items() if "norm" in n or "embed" in n)
    saved = sum(p.numel() for p in quantised.values())
    assert saved == 4 * (512 * (768 + 512) + 3 * 512 * 2048)
    assert weight_bytes(llm) <= plain[0] - saved


def test_close_to_the_unquantised_model(llm, plain):
    difference = (logprobs(llm) - plain[1]).abs()
    assert difference.median() < 0.2  # the logits have a deviation of about 3
    assert 0 < difference.max() < 1


def test_tokens_before_and_after_sleep(llm, expected):
    assert tokens(llm, SOME, TOKENS) == expected
    before = weight_bytes(llm)
    for level in (1, 2):
        sleep_and_wake(llm, level)
        assert weight_bytes(llm) == before
        assert tokens(llm, SOME, TOKENS) == expected
