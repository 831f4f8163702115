# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend on the simulated NPU gives the same tokens as Hugging Face on the CPU."""

import pytest
from helpers.ascend_engine import engine
from helpers.engine import tokens
from helpers.reference import PROMPTS, hf_greedy


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine(tiny_model) as llm:
        yield llm


def test_its_platform_and_worker_are_those_in_use(llm):
    from vllm.platforms import current_platform

    assert type(current_platform).__module__ == "vllm_ascend.platform"
    worker = llm.llm_engine.model_executor.driver_worker.worker
    assert type(worker).__mro__[-3].__module__ == "vllm_ascend.worker.worker", type(worker).__mro__


def test_batched(llm, tiny_model):
    assert tokens(llm) == hf_greedy(tiny_model)


def test_one_by_one(llm, tiny_model):
    """With the prefix cache of the first pass."""
    for prompt, expected in zip(PROMPTS, hf_greedy(tiny_model), strict=True):
        assert tokens(llm, [prompt]) == [expected]
