# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: tokens equal those of the merged model, before and after sleep."""

import shutil
from functools import partial

import pytest
from helpers.engine import driver_worker, engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.reference import PROMPTS, hf_greedy, merge
from vllm.lora.request import LoRARequest

TOKENS = 8
SOME = PROMPTS[:3] + PROMPTS[6:7]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders by adapter id, copied so that a test can remove one; id 0 is no adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    names = {1: "tiny-qwen2-lora", 2: "tiny-qwen2-lora-attention"}
    return {
        0: None,
        **{n: shutil.copytree(make_model(name), folder / name) for n, name in names.items()},
    }


@pytest.fixture(scope="module")
def expected(tiny_model, adapters):
    """Tokens by adapter id."""
    merged = {n: path and partial(merge, path) for n, path in adapters.items()}
    answers = {n: hf_greedy(tiny_model, SOME, TOKENS, change=merged[n]) for n in adapters}
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = [a == b for a, b in zip(answers[one], answers[other], strict=True)]
        assert not any(same), "an adapter changes nothing"
    return answers


@pytest.fixture(scope="module")
def llm(tiny_model):
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with engine(tiny_model, enable_sleep_mode=True, **options) as llm:
        yield llm


@pytest.fixture
def request_of(adapters):
    requests = {n: LoRARequest(f"adapter {n}", n, str(path)) for n, path in adapters.items() if n}
    return lambda n: requests.get(n)


@pytest.fixture
def all_answers(llm, request_of):
    """Tokens of every prompt with each adapter and without one, by adapter id, in one batch."""

    def answers():
        ids = [i % 3 for i in range(3 * len(SOME))]
        prompts = [prompt for prompt in SOME for _ in range(3)]
        flat = tokens(llm, prompts, TOKENS, lora_request=[request_of(i) for i in ids])
        return {n: flat[n::3] for n in range(3)}

    return answers


def test_requests_with_and_without_adapters_share_a_batch(all_answers, expected):
    assert all_answers() == expected


def test_level_1(llm, all_answers, expected):
    sleep_and_wake(llm, 1)
    assert llm.llm_engine.list_loras() == {1, 2}
    assert all_answers() == expected


def test_adapters_are_not_loaded_into_sleeping_memory(llm, request_of, expected, all_answers):
    llm.sleep(level=1)
    with pytest.raises(Exception, match=r"add_lora needs memory that is asleep \(weights\)"):
        llm.llm_engine.add_lora(request_of(1))
    with pytest.raises(Exception, match=r"pin_lora needs memory that is asleep \(weights\)"):
        llm.llm_engine.pin_lora(2)
    llm.wake_up()
    assert all_answers() == expected


def test_level_2_with_reload(llm, all_answers, expected):
    llm.llm_engine.pin_lora(1)
    sleep_and_wake(llm, 2)
    assert llm.llm_engine.list_loras() == {1, 2}
    manager = driver_worker(llm).model_runner.lora_manager._adapter_manager
    assert manager._active_adapters.pinned_items == {1}
    assert sorted(manager.lora_index_to_id) == [1, 2]
    assert all_answers() == expected


def test_level_2_and_weights_written_into_the_parameters(llm, all_answers, expected):
    """The wake itself restores adapters, however the weights are loaded."""
    parameters = dict(driver_worker(llm).model_runner.model.named_parameters())
    saved = {name: parameter.cpu() for name, parameter in parameters.items()}
    llm.sleep(level=2)
    llm.wake_up()
    for name, content in saved.items():
        parameters[name].data.copy_(content)
    assert all_answers() == expected


def test_adapters_survive_level_2_without_their_folders(llm, all_answers, expected, adapters):
    assert all_answers() == expected
    for path in adapters.values():
        if path is not None:
            shutil.rmtree(path)
    sleep_and_wake(llm, 2)
    assert all_answers() == expected
