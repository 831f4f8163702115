# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding by EAGLE heads and by a model's own layer for it (MTP): the target's tokens
and the same drafts, also after sleep. What they share with the target stays the target's."""

import pytest
import torch
from helpers.drafts import KINDS, SOME, TOKENS, answer, assert_kept_by_level_2, options_of
from helpers.engine import draft_counts, driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.reference import assert_greedy, hf_greedy
from safetensors.torch import load_file, save_file

from vllm_sleep_ascend.errors import SleepModeError, WeightsError
from vllm_sleep_ascend.rank.weights.content import DRAFT


@pytest.fixture(scope="module", params=KINDS)
def llm(request):
    from vllm.config import WeightTransferConfig

    target = make_model(KINDS[request.param][0])
    options = {
        **options_of(request.param),
        "weight_transfer_config": WeightTransferConfig(backend="safetensors"),
    }
    with engine(target, enable_sleep_mode=True, **options) as llm:
        llm.kind = request.param
        llm.expected = hf_greedy(target, SOME, TOKENS)
        llm.init_weight_transfer_engine({"init_info": {}})
        yield llm


def test_tokens_and_drafts_before_and_after_sleep(llm):
    said, drafted, taken = answer(llm)
    assert said == llm.expected
    assert taken > KINDS[llm.kind][3] * drafted
    for level in (1, 2, 2, 1):
        sleep_and_wake(llm, level)
        assert answer(llm) == (llm.expected, drafted, taken), f"after level {level}"


def test_level_2_keeps_what_is_the_drafts_own(llm):
    worker = driver_worker(llm)
    draft, target = worker.get_draft_model(), worker.model_runner.get_model()
    whole = {id(parameter) for parameter in target.parameters()}
    own = {n: p for n, p in draft.named_parameters() if id(p) not in whole}
    assert len(own) < len(dict(draft.named_parameters()))
    assert_kept_by_level_2(llm, own)


@pytest.fixture
def weights(llm):
    """All that a checkpoint may have for the draft, with zeros where it shares with the target."""
    target, head, *_ = KINDS[llm.kind]
    found = load_file(make_model(head or target) / "model.safetensors")
    if head is None:
        last = llm.llm_engine.model_config.hf_config.num_hidden_layers
        found = {name: weight for name, weight in found.items() if f".layers.{last}." in name}
    embedding = load_file(make_model(target) / "model.safetensors")["model.embed_tokens.weight"]
    found["model.embed_tokens.weight" if head is None else "embed_tokens.weight"] = embedding
    ends = ("embed_tokens.weight", "shared_head.head.weight")
    return {n: torch.zeros_like(w) if n.endswith(ends) else w for n, w in found.items()}


def update(llm, path, weights):
    save_file(weights, path)
    llm.collective_rpc("start_draft_weight_update")
    llm.update_weights({"update_info": {"path": str(path)}})
    llm.finish_weight_update()


def test_loads_of_the_draft_leave_the_target_as_it_is(llm, weights, tmp_path):
    before = answer(llm)
    update(llm, tmp_path / "all", weights)
    assert answer(llm) == before
    ends = ("mlp.up_proj.weight", "shared_experts.up_proj.weight")
    part = next(name for name in weights if name.endswith(ends))
    lacking = {name: weight for name, weight in weights.items() if name != part}
    with pytest.raises(WeightsError, match=r"no weights for draft\..*up_proj"):
        update(llm, tmp_path / "part", lacking)
    assert answer(llm) == before

    def breaks_off():
        yield from weights.items()
        raise OSError("the disk is gone")

    draft = driver_worker(llm).get_draft_model()
    with pytest.raises(OSError, match="the disk is gone"):
        draft.load_weights(breaks_off())
    assert answer(llm) == before


def test_what_is_lost_of_the_target_is_not_brought_by_the_draft(llm, weights, tmp_path):
    before = answer(llm)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    update(llm, tmp_path / "all", weights)
    llm.wake_up(tags=["kv_cache"])
    with pytest.raises(SleepModeError, match="have not been loaded since"):
        tokens(llm, SOME, TOKENS)
    llm.collective_rpc("reload_weights")
    assert answer(llm) == before


def test_a_draft_that_is_lost_comes_from_its_checkpoint(llm):
    """As when a backup of it was damaged."""
    before = answer(llm)
    driver_worker(llm).rank_weights.content.spoil(DRAFT)
    llm.collective_rpc("reload_weights")
    assert answer(llm) == before


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits(kind):
    target = make_model(KINDS[kind][0])
    with engine(target, dtype="bfloat16", **options_of(kind)) as llm:
        answers = tokens(llm)
        drafted, taken = draft_counts(llm)
    assert taken > KINDS[kind][3] * drafted > 0
    assert_greedy(target, answers)
