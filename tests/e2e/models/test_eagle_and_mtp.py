# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding by EAGLE heads and by a model's own layer for it (MTP): the target's tokens
and the same drafts, also after sleep. Both share parameters with the target."""

import pytest
import torch
from helpers.engine import draft_counts, driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.reference import PROMPTS, assert_greedy, hf_greedy
from safetensors.torch import load_file, save_file

TOKENS = 16
SOME = PROMPTS[:4]

# Method, target, head, drafts in a row, the share of them that is accepted at least.
KINDS = {
    "eagle": ("tiny-llama", "tiny-llama-eagle", 3, 0.6),
    "eagle3": ("tiny-llama", "tiny-llama-eagle3", 3, 0.2),
    "mtp": ("tiny-deepseek-v3-mtp", None, 1, 0.6),
}


def options_of(kind: str) -> dict:
    _, head, in_a_row, _ = KINDS[kind]
    speculative = {"method": kind, "num_speculative_tokens": in_a_row}
    if head is not None:
        speculative["model"] = str(make_model(head))
    return {"speculative_config": speculative, "disable_log_stats": False}


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


def answer(llm):
    """Tokens, the number of drafted tokens, and the number of accepted ones."""
    llm.reset_prefix_cache()
    before = draft_counts(llm)
    said = tokens(llm, SOME, TOKENS)
    return said, *(new - old for new, old in zip(draft_counts(llm), before, strict=True))


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
    before = {name: tensor.cpu() for name, tensor in own.items()}
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    for name, tensor in own.items():
        assert torch.equal(tensor.cpu(), before[name]), name
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def test_an_update_of_the_draft_leaves_the_target_as_it_is(llm, tmp_path):
    """Also of what they share: the target's tokens would be wrong."""
    if llm.kind == "eagle3":
        pytest.skip("its checkpoint has no parameter that it shares")
    before = answer(llm)
    path = tmp_path / "draft.safetensors"
    head = KINDS[llm.kind][1]
    weights = load_file(make_model(head or KINDS[llm.kind][0]) / "model.safetensors")
    if head is None:
        weights = {name: w for name, w in weights.items() if ".layers.4." in name}
    shared = "embed_tokens.weight" if head else "model.embed_tokens.weight"
    weights[shared] = torch.zeros(2048, 128, dtype=torch.bfloat16)
    save_file(weights, path)
    llm.collective_rpc("start_draft_weight_update")
    llm.update_weights({"update_info": {"path": str(path)}})
    llm.finish_weight_update()
    assert answer(llm) == before


def test_sixteen_bits(kind_of_sixteen):
    kind, llm = kind_of_sixteen
    answers = tokens(llm)
    drafted, taken = draft_counts(llm)
    assert taken > KINDS[kind][3] * drafted > 0
    assert_greedy(make_model(KINDS[kind][0]), answers)


@pytest.fixture(params=KINDS)
def kind_of_sixteen(request):
    target = make_model(KINDS[request.param][0])
    with engine(target, dtype="bfloat16", **options_of(request.param)) as llm:
        yield request.param, llm
