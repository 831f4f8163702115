# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding with a draft model: the target's tokens, also after sleep."""

import pytest
import torch
from helpers.drafts import SOME, TOKENS, answer, assert_kept_by_level_2
from helpers.engine import driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.reference import assert_greedy, hf_greedy
from safetensors.torch import load_file, save_file

from vllm_sleep_ascend.errors import SleepModeError, WeightsError


@pytest.fixture(scope="module", params=["itself", "another"])
def llm(request, tiny_model):
    """If the model is its own draft model, every draft is accepted; otherwise hardly any."""
    from vllm.config import WeightTransferConfig

    draft = tiny_model if request.param == "itself" else make_model("tiny-qwen2-draft")
    speculative = {"model": str(draft), "num_speculative_tokens": 3, "method": "draft_model"}
    options = {
        "speculative_config": speculative,
        "disable_log_stats": False,
        "weight_transfer_config": WeightTransferConfig(backend="safetensors"),
    }
    with engine(tiny_model, enable_sleep_mode=True, **options) as llm:
        llm.drafts_itself = request.param == "itself"
        llm.draft = draft
        llm.init_weight_transfer_engine({"init_info": {}})
        yield llm


@pytest.fixture(scope="module")
def expected(tiny_model):
    return hf_greedy(tiny_model, SOME, TOKENS)


def test_tokens_and_drafts_before_and_after_sleep(llm, expected):
    said, drafted, taken = answer(llm)
    assert said == expected
    assert drafted > 0
    assert taken > 0.7 * drafted if llm.drafts_itself else taken < 0.3 * drafted
    for level in (1, 2):
        sleep_and_wake(llm, level)
        assert answer(llm) == (expected, drafted, taken), f"after level {level}"


def test_level_2_keeps_the_drafts_buffers_and_parameters(llm):
    draft = driver_worker(llm).get_draft_model()
    tensors = {**dict(draft.named_buffers()), **dict(draft.named_parameters())}
    assert dict(draft.named_buffers())
    assert_kept_by_level_2(llm, tensors)


def test_an_update_of_the_draft_after_level_2_is_whole_or_rolled_back(llm, expected, tmp_path):
    before = answer(llm)
    weights = load_file(llm.draft / "model.safetensors")
    lacking, path = "model.layers.0.mlp.up_proj.weight", tmp_path / "draft.safetensors"

    def update(**weights):
        save_file(weights, path)
        llm.collective_rpc("start_draft_weight_update")
        llm.update_weights({"update_info": {"path": str(path)}})
        with pytest.raises(SleepModeError, match="under way; call finish_weight_update"):
            tokens(llm, SOME, TOKENS)
        llm.finish_weight_update()

    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    with pytest.raises(WeightsError, match=f"no weights for draft.{lacking}; .* before it"):
        update(**{name: weight for name, weight in weights.items() if name != lacking})
    assert answer(llm) == before
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    update(**zeros)
    said, drafted, taken = answer(llm)
    assert (said, taken) == (expected, 0)
    assert drafted > 0
    update(**weights)
    assert answer(llm) == before


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sixteen_bits(tiny_model, asynchronous):
    """NPU operators attend for the draft model, whose lengths come from the device."""
    from vllm_sleep_ascend.sim import control

    draft = {
        "model": str(make_model("tiny-qwen2-draft")),
        "num_speculative_tokens": 3,
        "method": "draft_model",
    }
    options = {"speculative_config": draft, "async_scheduling": asynchronous}
    with engine(tiny_model, dtype="bfloat16", **options) as llm:
        control.reset_counters()
        answers = tokens(llm)
        assert control.call_count("npu::npu_fused_infer_attention_score") > 0
    assert_greedy(tiny_model, answers)
