# SPDX-License-Identifier: Apache-2.0
"""Models with image inputs: Hugging Face's answers before sleep and after each level."""

import pytest
import torch
from helpers.engine import driver_worker, engine, sleep_and_wake
from helpers.models import make_model, other_weights
from helpers.vision import OTHER, QUESTIONS, TEXT, WIDE, Question, ask, hf_answers, options_of
from safetensors.torch import load_file

MODELS = [
    "tiny-qwen3-vl",
    pytest.param("tiny-phi3v", marks=pytest.mark.slow),
    pytest.param("tiny-qwen2.5-vl", marks=pytest.mark.slow),
    pytest.param("tiny-smolvlm", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def llm(model):
    with engine(model, enable_sleep_mode=True, **options_of(model)) as llm:
        yield llm


def encoded(llm) -> int:
    """Images whose embeddings are cached on the device."""
    return len(driver_worker(llm).model_runner.encoder_cache)


def processed(llm) -> list:
    """The caches of preprocessed images: the engine's, and the front end's of what that has."""
    sender = llm.llm_engine.renderer.mm_processor_cache
    receiver = llm.llm_engine.engine_core.engine_core.mm_receiver_cache
    return [sender._cache, receiver._cache]


def static_tensors(llm) -> dict:
    """Where what the model computes with and no checkpoint has is, and its content."""
    return {
        f"{path}.{name}": (tensor.data_ptr(), tensor.cpu())
        for path, module in driver_worker(llm).model_runner.get_model().named_modules()
        for name, tensor in {**vars(module), **module._buffers}.items()
        if isinstance(tensor, torch.Tensor) and name != "kv_cache"
    }


def test_the_answers_tell_the_images_apart(model):
    answers = hf_answers(model)
    assert len({tuple(answer) for answer in answers}) == len(QUESTIONS)
    assert all(len(set(answer)) > len(answer) // 2 for answer in answers), "answers repeat a token"


def test_none_one_and_several_images(llm, model):
    assert ask(llm) == hf_answers(model)
    for question, expected in zip(QUESTIONS, hf_answers(model), strict=True):
        assert ask(llm, [question]) == [expected], "with the caches of the batch"


@pytest.mark.parametrize("level", [1, 2])
def test_the_same_answers_after_sleep(llm, model, level):
    """Tensors that no load writes, such as tables of positions, are back before the load."""
    before = static_tensors(llm)
    assert any("rotary" in name or "position" in name for name in before)
    assert ask(llm) == hf_answers(model)
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    after = static_tensors(llm)
    assert after.keys() == before.keys()
    for name, (address, content) in before.items():
        assert after[name][0] == address, name
        assert after[name][1].equal(content), name
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert ask(llm) == hf_answers(model)


@pytest.mark.parametrize("level", [1, 2])
def test_no_image_is_cached_through_a_sleep(llm, model, level):
    """Neither its embeddings on the device nor its pixels, which clients would not send again."""
    ask(llm, QUESTIONS[1:3])
    assert encoded(llm) > 0
    assert all(len(cache) >= 2 for cache in processed(llm))
    sleep_and_wake(llm, level)
    assert encoded(llm) == 0
    assert [len(cache) for cache in processed(llm)] == [0, 0]
    assert ask(llm, QUESTIONS[2:3]) == hf_answers(model, QUESTIONS[2:3])
    assert encoded(llm) == 1


def test_other_weights_after_level_2_see_the_same_image_anew(llm, model, tmp_path):
    """A stale embedding of the image would give another answer."""
    other = other_weights(model, tmp_path / "other")
    questions = [Question((WIDE,), TEXT), Question((OTHER, WIDE), TEXT)]
    assert hf_answers(other, questions) != hf_answers(model, questions)
    assert ask(llm, questions) == hf_answers(model, questions)
    for path in (other, model):
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        llm.wake_up(tags=["kv_cache"])
        assert ask(llm, questions) == hf_answers(path, questions)


def test_weights_that_are_loaded_without_a_sleep_see_the_same_image_anew(llm, model, tmp_path):
    """Stock vLLM's scheduler counts it as encoded, and the engine would end."""
    other = other_weights(model, tmp_path / "other")
    questions = [Question((OTHER,), TEXT), Question((OTHER, WIDE), TEXT)]
    assert ask(llm, questions) == hf_answers(model, questions)
    for path in (other, model):
        assert encoded(llm) > 0
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        llm.reset_prefix_cache()
        assert ask(llm, questions) == hf_answers(path, questions)
    llm.collective_rpc("reload_weights")
    llm.llm_engine.reset_encoder_cache()
    assert ask(llm, questions) == hf_answers(model, questions)


def test_images_that_the_scheduler_forgets_are_forgotten_after_a_load_too(llm):
    """It forgets the oldest when it needs the space."""
    runner = driver_worker(llm).model_runner
    ask(llm, [Question((WIDE._replace(seed=100),), TEXT)], n=1)
    images = set(runner.encoder_cache)
    assert images
    llm.collective_rpc("reload_weights")
    assert images <= runner._dropped_images
    for seed in range(101, 125):
        ask(llm, [Question((WIDE._replace(seed=seed),), TEXT)], n=1)
    assert not images & runner._dropped_images


def test_after_a_users_own_load_a_reset_has_the_same_image_seen_anew(llm, model, tmp_path):
    other = other_weights(model, tmp_path / "other")
    questions = [Question((OTHER,), TEXT), Question((OTHER, WIDE), TEXT)]
    assert ask(llm, questions) == hf_answers(model, questions)
    for path in (other, model):
        weights = load_file(path / "model.safetensors")
        driver_worker(llm).model_runner.get_model().load_weights(weights.items())
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        assert ask(llm, questions) == hf_answers(path, questions)
