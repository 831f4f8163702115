# SPDX-License-Identifier: Apache-2.0
"""What a step costs, by the simulated device's counters: the limits that later work must keep."""

import pytest
import torch
from helpers.engine import driver_worker, engine, sleep_and_wake
from helpers.models import make_model

OPERATORS = (
    "npu::npu_rms_norm",
    "npu::npu_add_rms_norm",
    "npu::npu_swiglu",
    "npu::npu_mrope",
    "npu::npu_fused_infer_attention_score",
    "atb::_npu_reshape_and_cache",
)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def llm(request):
    """NPU operators attend in 16 bits only."""
    with engine(make_model("tiny-qwen2"), dtype=request.param, enable_sleep_mode=True) as llm:
        yield llm


def costs_of(llm, tokens):
    from vllm import SamplingParams

    from vllm_sleep_ascend.sim import control

    control.reset_counters()
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    llm.generate(["The sea"], parameters, use_tqdm=False)
    costs = control.costs()
    counts = {name: control.call_count(name) for name in OPERATORS}
    return {
        "launches": costs.launches,
        "on_ai_cpu": costs.on_ai_cpu,
        "hidden_copy_bytes": costs.hidden_copy_bytes,
        "waits": costs.waits,
        **counts,
    }


def decode_step(llm):
    """One more token of one request: what a request costs at its start and its end cancels out."""
    costs_of(llm, 4)
    few, more = costs_of(llm, 4), costs_of(llm, 5)
    return {name: more[name] - few[name] for name in few}


@pytest.mark.parametrize("level", [1, 2])
def test_a_decode_step_before_and_after_sleep(llm, level):
    step = decode_step(llm)
    layers = driver_worker(llm).model_config.hf_config.num_hidden_layers
    in_pytorch = driver_worker(llm).model_config.dtype == torch.float32
    attends = 0 if in_pytorch else layers
    assert {name: step[name] for name in OPERATORS} == {
        "npu::npu_rms_norm": 1,  # the first; the others come with their residual
        "npu::npu_add_rms_norm": 2 * layers,
        "npu::npu_swiglu": layers,
        "npu::npu_mrope": layers,
        "npu::npu_fused_infer_attention_score": attends,
        "atb::_npu_reshape_and_cache": attends,
    }
    assert step["on_ai_cpu"] == step["hidden_copy_bytes"] == 0
    assert step["launches"] <= (22 * layers + 63 if in_pytorch else 10 * layers + 41)
    assert step["waits"] == 2  # the sampled token; and that the last step's inputs were copied
    sleep_and_wake(llm, level)
    assert decode_step(llm) == step


def test_a_prefill_needs_no_ai_cpu(llm):
    costs = costs_of(llm, 1)
    assert costs["on_ai_cpu"] == costs["hidden_copy_bytes"] == 0
