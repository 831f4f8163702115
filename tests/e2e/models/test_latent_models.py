# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 and V3: multi-head latent attention, whose matrices are views of the weights that a
load brings, and experts chosen in groups. The tokens are Hugging Face's, before and after sleep."""

import pytest
from helpers import MIB
from helpers.engine import driver_worker, engine, few, mapped, only_rank, send_update, tokens, used
from helpers.models import make_model, other_weights
from helpers.reference import PROMPTS, hf_few, hf_greedy
from safetensors.torch import load_file

MODELS = (
    "tiny-deepseek-v2",
    "tiny-deepseek-v3",
    pytest.param("tiny-deepseek-v2-lite", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def other(model, tmp_path_factory):
    other = other_weights(model, tmp_path_factory.mktemp("other") / "model")
    assert all(a != b for a, b in zip(hf_few(other), hf_few(model), strict=True))
    return other


@pytest.fixture(scope="module")
def llm(model):
    from vllm.config import WeightTransferConfig

    transfer = WeightTransferConfig(backend="safetensors")
    with engine(model, enable_sleep_mode=True, weight_transfer_config=transfer) as llm:
        yield llm


def attention_layers(llm):
    layers = driver_worker(llm).model_runner.get_model().model.layers
    return [layer.self_attn.mla_attn.mla_attn for layer in layers]


def derived_addresses(llm):
    layers = attention_layers(llm)
    return [(layer.W_UK_T.data_ptr(), layer.W_UV.data_ptr()) for layer in layers]


def test_batched_and_one_by_one(llm, model):
    """The second pass uses the first one's prefix cache. One prompt comes in chunks."""
    assert tokens(llm) == hf_greedy(model)
    for prompt, expected in zip(PROMPTS, hf_greedy(model), strict=True):
        assert tokens(llm, [prompt]) == [expected]


def test_common_prefix(llm, model):
    prompts = [PROMPTS[-1] + end for end in ("", "And", "And then the end.")]
    assert tokens(llm, prompts) == hf_greedy(model, prompts)


def test_all_memory_sleeps_and_the_tokens_stay(llm, model):
    awake, ours = used(), mapped("weights") + mapped("kv_cache")
    for level in (1, 2):
        llm.sleep(level=level)
        assert mapped("weights") == mapped("kv_cache") == 0
        asleep = used()
        assert asleep <= awake - ours
        assert asleep < 64 * MIB
        llm.wake_up(tags=["weights"])
        if level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        assert used() - asleep == ours
        assert tokens(llm) == hf_greedy(model), f"after level {level}"


def test_the_derived_matrices_take_no_memory(llm):
    for layer in attention_layers(llm):
        weight = layer.kv_b_proj.weight
        for part in (layer.W_UK_T, layer.W_UV):
            assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
            assert part.numel() == weight.numel() / 2


def test_the_derived_matrices_follow_every_load(llm, model, other, tmp_path):
    """Were they those of the weights before, the tokens would be neither model's."""
    before = derived_addresses(llm)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    llm.wake_up(tags=["kv_cache"])
    assert few(llm) == hf_few(other)
    assert derived_addresses(llm) == before

    llm.init_weight_transfer_engine({"init_info": {}})
    for level in (0, 2):
        if level:
            llm.sleep(level=level)
            llm.wake_up()
        send_update(llm, load_file(model / "model.safetensors"), tmp_path)
        llm.reset_prefix_cache()
        assert few(llm) == hf_few(model)
        assert derived_addresses(llm) == before
        if not level:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
            llm.reset_prefix_cache()
            assert few(llm) == hf_few(other)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})


def test_what_is_missing_has_the_names_of_a_checkpoint(llm, model, tmp_path):
    from vllm_sleep_ascend.errors import SleepModeError

    llm.sleep(level=2)
    llm.wake_up()
    status = only_rank(llm)
    parameters = dict(driver_worker(llm).model_runner.get_model().named_parameters())
    derived = [name for name in parameters if name.endswith(("W_UK_T", "W_UV"))]
    assert len(derived) == 2 * len(attention_layers(llm))
    assert status["parameters_without_content"] == len(parameters) - len(derived)
    with pytest.raises(SleepModeError) as refused:
        few(llm)
    assert "W_U" not in str(refused.value)
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    assert few(llm) == hf_few(model)
