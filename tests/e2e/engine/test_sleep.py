# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake through ``LLM``, engine in this process: memory, tokens, refusals."""

import gc
import re

import psutil
import pytest
import torch
from helpers import MIB
from helpers.engine import engine, few, mapped, start, tokens, used
from helpers.faults import DRIVER_ERROR
from helpers.reference import FEW_TOKENS, PROMPTS, hf_greedy
from vllm import SamplingParams

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.pool import use_pool
from vllm_sleep_ascend.sim import control


def test_level_1_frees_weights_and_cache_and_keeps_the_tokens(llm, tiny_model):
    expected = hf_greedy(tiny_model)
    assert tokens(llm) == expected
    awake = used()
    ours = mapped("weights") + mapped("kv_cache")
    llm.sleep(level=1)
    assert llm.llm_engine.is_sleeping()
    assert mapped("weights") == mapped("kv_cache") == 0
    asleep = used()
    assert asleep <= awake - ours
    assert asleep < 64 * MIB
    llm.wake_up()
    assert not llm.llm_engine.is_sleeping()
    assert used() - asleep == ours
    assert tokens(llm) == expected


def test_level_2_with_reload_keeps_the_tokens(llm, expected):
    llm.sleep(level=2)
    assert _camem.pinned_host_bytes() == sum(
        a["host_bytes"] for a in _camem.allocations() if a["tag"] == "runtime"
    )
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    assert llm.llm_engine.is_sleeping()
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    assert few(llm) == expected


@pytest.mark.parametrize("first", [None, 1])
def test_level_2_keeps_buffers_and_forgets_parameters(llm, first):
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    parameter = dict(model.named_parameters())["model.norm.weight"]
    before = parameter.cpu()
    assert buffers
    if first is not None:
        llm.sleep(level=first)
    llm.sleep(level=2)
    llm.wake_up()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.cpu(), buffers[name]), name
    assert not torch.equal(parameter.cpu(), before)
    llm.collective_rpc("reload_weights")
    assert torch.equal(parameter.cpu(), before)


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_tags_wake_in_any_order(llm, expected, order):
    llm.sleep(level=1)
    assert llm.wake_up(tags=order[:1]) is False
    assert mapped(order[0]) > 0
    assert mapped(order[1]) == 0
    assert llm.llm_engine.is_sleeping()
    assert llm.wake_up(tags=order[1:]) is True
    assert few(llm) == expected


def test_a_wake_that_names_an_awake_tag_wakes_the_other(llm, expected):
    llm.sleep(level=1)
    llm.wake_up(tags=["weights"])
    assert llm.wake_up(tags=["weights", "kv_cache", "kv_cache"]) is True
    assert few(llm) == expected


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", [1, 2])
@pytest.mark.parametrize("woken", ["weights", "kv_cache"])
def test_a_second_sleep_after_a_partial_wake_puts_all_to_sleep(llm, expected, first, second, woken):
    llm.sleep(level=first)
    llm.wake_up(tags=[woken])
    llm.sleep(level=second)
    assert mapped("weights") == mapped("kv_cache") == 0
    for tag in ("weights", "kv_cache"):
        assert llm.llm_engine.is_sleeping()
        llm.wake_up(tags=[tag])
    assert not llm.llm_engine.is_sleeping()
    if 2 in (first, second):
        llm.collective_rpc("reload_weights")
    assert few(llm) == expected


def test_an_engine_that_sleeps_is_not_resumed_nor_waited_for(llm, tiny_model):
    sampling = SamplingParams(temperature=0, max_tokens=FEW_TOKENS, ignore_eos=True)
    llm.enqueue(PROMPTS, sampling, use_tqdm=False)
    llm.sleep(level=1, mode="keep")
    with pytest.raises(SleepModeError, match=r"call wake_up\(\) before wait_for_completion\(\)"):
        llm.wait_for_completion(use_tqdm=False)
    with pytest.raises(SleepModeError, match=r"wake it with wake_up\(\) before it resumes"):
        llm.llm_engine.engine_core.engine_core.resume_scheduler()
    assert llm.llm_engine.is_sleeping()
    llm.wake_up()
    outputs = llm.wait_for_completion(use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    assert answers == hf_greedy(tiny_model, PROMPTS, FEW_TOKENS)


@pytest.mark.parametrize("level", [3, -1, "1"])
def test_a_level_that_does_not_exist_is_refused_and_the_engine_serves_on(llm, expected, level):
    with pytest.raises(ValueError, match=f"sleep level {level!r} does not exist"):
        llm.sleep(level=level)
    assert not llm.llm_engine.is_sleeping()
    assert few(llm) == expected


def test_a_tag_that_does_not_exist_is_refused_awake_and_asleep(llm, expected):
    message = re.escape("tag 'wieghts' does not exist; use some of weights, kv_cache, scheduling")
    with pytest.raises(ValueError, match=message):
        llm.wake_up(tags=["wieghts"])
    llm.sleep(level=1)
    with pytest.raises(ValueError, match=message):
        llm.wake_up(tags=["wieghts"])
    assert mapped("weights") == 0
    llm.wake_up()
    assert few(llm) == expected


def test_a_second_sleep_and_a_wake_while_awake_do_nothing(llm, expected):
    llm.wake_up()
    llm.sleep(level=1)
    asleep = used()
    llm.sleep(level=1)
    assert used() == asleep
    llm.wake_up()
    llm.wake_up()
    assert few(llm) == expected


def test_level_0_moves_no_memory(llm, expected):
    before = used()
    llm.sleep(level=0)
    assert llm.llm_engine.is_sleeping()
    assert used() == before
    assert llm.wake_up(tags=["scheduling"]) is True
    assert few(llm) == expected


def test_20_cycles_leave_memory_handles_mappings_and_rss_where_they_were(llm, expected):
    process = psutil.Process()
    figures = []
    for _ in range(20):
        llm.sleep(level=1)
        llm.wake_up()
        gc.collect()
        figures.append((used(), control.counters(), _camem.pinned_host_bytes()))
        if len(figures) == 3:
            rss = process.memory_info().rss
    assert len(set(figures[2:])) == 1
    assert process.memory_info().rss - rss < 32 * MIB
    assert few(llm) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_workers_that_are_put_to_sleep_past_the_engine(llm, tiny_model, expected, level):
    engine = llm.llm_engine
    tokens(llm)  # leaves blocks in the prefix cache
    llm.enqueue(PROMPTS, SamplingParams(temperature=0, max_tokens=FEW_TOKENS, ignore_eos=True))
    for _ in range(4):
        engine.step()
    llm.collective_rpc("sleep", kwargs={"level": level})
    assert engine.is_sleeping() and engine.step() == []
    with pytest.raises(SleepModeError, match=r"call wake_up\(\) before generate\(\)"):
        llm.generate(PROMPTS, use_tqdm=False)
    llm.collective_rpc("wake_up", kwargs={"tags": ["weights"]})
    if level == 2:
        llm.collective_rpc("reload_weights")
    assert engine.is_sleeping() and engine.step() == []
    llm.collective_rpc("wake_up")
    assert not engine.is_sleeping()
    outputs = llm.wait_for_completion(use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    assert answers == hf_greedy(tiny_model, PROMPTS, FEW_TOKENS)
    assert few(llm) == expected


def left_by_an_engine(tiny_model, level: int) -> torch.Tensor:
    """A constant as of a library that is imported while a model is built: in the memory of the
    weights, of an engine that has ended asleep."""
    with engine(tiny_model, enable_sleep_mode=True) as llm:
        with use_pool("weights"):
            constant = torch.arange(8.0, device="npu")
        llm.sleep(level)
    return constant


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("sleeps", [True, False])
def test_what_an_engine_left_asleep_wakes_when_the_next_one_starts(
    tiny_model, expected, sleeps, level
):
    def state() -> str:
        address = constant.data_ptr()
        (found,) = (
            a["state"]
            for a in _camem.allocations()
            if a["address"] <= address < a["address"] + a["bytes"]
        )
        return found

    constant = left_by_an_engine(tiny_model, level)
    gc.collect()
    assert state() == ("offloaded" if level == 1 else "discarded")
    with engine(tiny_model, enable_sleep_mode=sleeps) as llm:
        assert state() == "mapped"
        assert constant.tolist() == list(range(8))
        assert few(llm) == expected
        for again in (1, 2) if sleeps else ():
            llm.sleep(again)
            llm.wake_up()
            llm.collective_rpc("reload_weights")
            assert few(llm) == expected
            assert constant.tolist() == list(range(8))


def test_a_start_names_what_an_ended_engine_left_and_could_not_wake(tiny_model, expected):
    constant = left_by_an_engine(tiny_model, 1)
    control.set_faults(f"aclrtMapMem:1:{DRIVER_ERROR}:*")
    words = r"bytes that an ended engine left asleep are still in use, and could not wake: wake"
    with pytest.raises(SleepModeError, match=words):
        start(tiny_model, enable_sleep_mode=True)
    control.set_faults("")
    with engine(tiny_model, enable_sleep_mode=True) as llm:
        assert constant.tolist() == list(range(8))
        assert few(llm) == expected
