# SPDX-License-Identifier: Apache-2.0
"""Models with image inputs in engines with other options."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import MIB
from helpers.engine import engine, mapped, send_update, sleep_and_wake
from helpers.models import make_model, other_weights
from helpers.vision import QUESTIONS, TEXT, Picture, Question, ask, hf_answers, options_of
from safetensors.torch import load_file, save_file

from vllm_sleep_ascend.errors import SleepModeError, WeightsError


@pytest.mark.parametrize(
    "options",
    [
        {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["graphs", "two ranks"],
)
def test_other_engines(options):
    """Graphs of decode steps, and a tower on two ranks."""
    model = make_model("tiny-qwen2.5-vl")
    with engine(model, enable_sleep_mode=True, **options_of(model), **options) as llm:
        assert ask(llm) == hf_answers(model)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert ask(llm) == hf_answers(model), f"after level {level}"


@pytest.mark.slow
def test_with_triton_installed_the_tower_computes_in_pytorch(monkeypatch):
    """Qwen3-VL would launch a kernel of vLLM's, for other devices, on an image's positions."""
    from vllm.model_executor.models import qwen3_vl

    monkeypatch.setattr(qwen3_vl, "HAS_TRITON", True)
    model = make_model("tiny-qwen3-vl")
    with engine(model, **options_of(model)) as llm:
        assert ask(llm) == hf_answers(model)


@pytest.mark.slow
def test_phi3_vision_as_an_embedding_model_is_loaded_again():
    """vLLM converts its class to another, with another name."""
    model = make_model("tiny-phi3v")
    options = {"runner": "pooling", "convert": "embed", **options_of(model)}
    with engine(model, enable_sleep_mode=True, **options) as llm:

        def embed():
            return [one.outputs.embedding for one in llm.embed([TEXT], use_tqdm=False)]

        before = embed()
        sleep_and_wake(llm, 2)
        assert embed() == before


def test_a_start_leaves_room_for_the_largest_image():
    """vLLM encodes one before it sizes the KV cache. Four heads attend from each of its 64 by 64
    patches to all of them."""
    scores = 4 * 4096**2 * 4
    model = make_model("tiny-qwen2.5-vl")
    options = {
        "enable_sleep_mode": True,
        "kv_cache_memory_bytes": None,
        "max_num_batched_tokens": 1024,
        "mm_processor_kwargs": {"size": {"shortest_edge": 56**2, "longest_edge": 896**2}},
        **options_of(model),
    }
    with engine(model, **options) as llm:
        profiled = mapped("kv_cache")
        torch.npu.reset_peak_memory_stats()
        ask(llm, [Question((Picture(4, 896, 896),), TEXT)])
        peak = torch.npu.max_memory_allocated()
        assert profiled + scores < peak <= 1024 * MIB, "half of the device"
    with engine(model, skip_mm_profiling=True, **options) as llm:
        assert mapped("kv_cache") - profiled >= scores


def test_sixteen_bits():
    """Rounding may choose another token than in 32 bits, but the same one after each level."""
    model = make_model("tiny-qwen2.5-vl")
    with engine(model, dtype="bfloat16", enable_sleep_mode=True, **options_of(model)) as llm:
        before = ask(llm)
        same = [answer == want for answer, want in zip(before, hf_answers(model), strict=True)]
        assert sum(same) > len(same) / 2
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert ask(llm) == before, f"after level {level}"


def test_a_load_that_fails_on_one_rank_leaves_both_with_the_same_images(tmp_path):
    """A rank that lacks an image alone would wait for the other in the tower."""
    model = make_model("tiny-qwen2.5-vl")
    lost = "visual.blocks.1.attn.proj.weight"
    lacking = without(lost, model, tmp_path / "lacking")
    questions = QUESTIONS[1:3]
    options = {"tensor_parallel_size": 2, **options_of(model)}
    with engine(model, enable_sleep_mode=True, **options) as llm:
        assert ask(llm, questions) == hf_answers(model, questions)
        assert llm.collective_rpc(encoded) == [2, 2]
        llm.collective_rpc(rank_1_loads_from, args=(str(lacking),))
        with pytest.raises(WeightsError, match=f"failed on 1 of 2 ranks.*rank 1, .*{lost}"):
            llm.collective_rpc("reload_weights")
        llm.collective_rpc(rank_1_loads_from, args=(str(model),))
        assert llm.collective_rpc(encoded) == [0, 0]
        llm.reset_prefix_cache()
        assert ask(llm, questions) == hf_answers(model, questions)
        assert llm.collective_rpc(encoded) == [2, 2]


def encoded(worker) -> int:
    return len(worker.model_runner.encoder_cache)


def rank_1_loads_from(worker, path: str) -> None:
    if worker.rank == 1:
        worker.model_config.model = path


def without(lost: str, model: Path, out: Path) -> Path:
    """A copy of the model whose checkpoint lacks a weight."""
    shutil.copytree(model, out)
    file = out / "model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if name != lost}, file)
    return out


@pytest.mark.parametrize(
    "name,lost,seen_as",
    [
        ("tiny-qwen2.5-vl", "visual.blocks.1.attn.proj.weight", None),
        pytest.param(
            "tiny-phi3v",
            "model.vision_embed_tokens.img_projection.2.weight",
            "vision_embed_tokens.img_projection.2.weight",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wake_from_level_2_loads_the_tower_or_names_what_is_missing(
    name, lost, seen_as, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(make_model(name), model)
    file = model / "model.safetensors"
    whole = file.read_bytes()
    options = options_of(make_model(name))
    reload = {"sleep_mode": {"after_level2": "reload"}}
    expected = hf_answers(make_model(name), QUESTIONS[1:2])
    with engine(model, enable_sleep_mode=True, additional_config=reload, **options) as llm:
        llm.sleep(level=2)
        save_file({n: w for n, w in load_file(file).items() if n != lost}, file)
        with pytest.raises(SleepModeError, match=f"no weights for {seen_as or lost}"):
            llm.wake_up()
        assert llm.llm_engine.is_sleeping()
        file.write_bytes(whole)
        assert llm.wake_up() is True
        assert ask(llm, QUESTIONS[1:2]) == expected


def test_a_trainers_weights_see_the_same_image_anew(tmp_path):
    model = make_model("tiny-qwen2.5-vl")
    other = other_weights(model, tmp_path / "other")
    updates = {"weight_transfer_config": {"backend": "safetensors"}}
    questions = QUESTIONS[1:3]
    with engine(model, enable_sleep_mode=True, **updates, **options_of(model)) as llm:
        assert ask(llm, questions) == hf_answers(model, questions)
        llm.init_weight_transfer_engine({"init_info": {}})
        send_update(llm, load_file(other / "model.safetensors"), tmp_path)
        llm.reset_prefix_cache()
        assert ask(llm, questions) == hf_answers(other, questions)
