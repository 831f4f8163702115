# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts beside vllm-ascend: its weights are in the layout that is needed next."""

import pytest
import torch
from helpers.ascend_engine import engine
from helpers.engine import tokens
from helpers.models import make_model
from helpers.reference import PROMPTS, hf_greedy
from safetensors.torch import load_file

TOKENS = 8


@pytest.fixture(scope="module")
def model():
    return make_model("tiny-qwen3-moe")


@pytest.fixture(scope="module")
def llm(model):
    with engine(model, enable_sleep_mode=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(model):
    return hf_greedy(model, PROMPTS, TOKENS)


def network(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def experts(llm) -> dict[str, torch.nn.Parameter]:
    names = ("w13_weight", "w2_weight")
    return {n: p for n, p in network(llm).named_parameters() if n.endswith(names)}


def layouts(llm) -> dict[str, tuple]:
    return {name: (*weight.shape, weight.data_ptr()) for name, weight in experts(llm).items()}


def turned(layouts: dict[str, tuple]) -> dict[str, tuple]:
    return {n: (experts, b, a, address) for n, (experts, a, b, address) in layouts.items()}


def test_level_1_and_serve(llm, expected):
    assert tokens(llm, PROMPTS, TOKENS) == expected
    for_kernels = layouts(llm)
    assert for_kernels
    for _ in range(2):
        llm.sleep(level=1)
        llm.wake_up()
        assert layouts(llm) == turned(for_kernels)  # the checkpoint's, as in vllm-ascend
        assert tokens(llm, PROMPTS, TOKENS) == expected
        assert layouts(llm) == for_kernels


def test_level_2_and_reload(llm, expected):
    for_kernels = layouts(llm)
    for _ in range(2):
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        llm.reset_prefix_cache()
        assert tokens(llm, PROMPTS, TOKENS) == expected
        assert layouts(llm) == for_kernels


def test_level_2_and_a_trainer_that_loads_into_the_model(llm, model, expected):
    for_kernels = layouts(llm)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    network(llm).load_weights(load_file(model / "model.safetensors").items())
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    assert tokens(llm, PROMPTS, TOKENS) == expected
    assert layouts(llm) == for_kernels


def test_a_trainer_that_makes_new_weights_for_the_kernels(llm, expected):
    """As process_weights_after_loading does. New weights are copied into the original memory."""
    for_kernels = layouts(llm)
    llm.sleep(level=1)
    llm.wake_up()
    for module in network(llm).modules():
        for name in ("w13_weight", "w2_weight"):
            shown = module._parameters.get(name)
            if shown is not None:
                new = shown.data.transpose(1, 2).contiguous().clone()
                setattr(module, name, torch.nn.Parameter(new, requires_grad=False))
    assert tokens(llm, PROMPTS, TOKENS) == expected
    assert layouts(llm) == for_kernels
