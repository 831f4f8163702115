# SPDX-License-Identifier: Apache-2.0
"""Calls that reach a worker while its memory sleeps are refused before they run, unless they are
known to be safe. A call that accessed the weights would abort this process."""

import re
from contextlib import nullcontext

import pytest
from helpers.engine import driver_worker, engine, few
from safetensors.torch import load_file

from vllm_sleep_ascend import policy, safe_while_asleep
from vllm_sleep_ascend.errors import SleepModeError

ran: list[str] = []


def total_of(worker) -> float:
    ran.append("total_of")
    return sum(float(p.detach().sum()) for p in worker.model_runner.model.parameters())


def total(model) -> float:
    ran.append("total")
    return sum(float(p.detach().sum()) for p in model.parameters())


@safe_while_asleep
def device_index(worker) -> int:
    return worker.device.index


def refused(llm, method, args=(), asleep="weights and kv_cache") -> None:
    ran.clear()
    name = method if isinstance(method, str) else method.__qualname__
    words = rf"{re.escape(name)} was not run: {asleep} are asleep.*calls_while_asleep': 'allow'"
    with pytest.raises(SleepModeError, match=words):
        llm.collective_rpc(method, args=args)
    assert not ran


ARGUMENTS = {
    "sleep": (1,),
    "discard": (("kv_cache",),),
    "sleep_refusal": (1,),
    "profile": (False,),
    "init_weight_transfer_engine": ({},),
    "set_weight_version": ("default",),
}
# The method's own error in an engine without its option.
NEEDS_AN_OPTION = {
    "profile": "Profiling is not enabled",
    "init_weight_transfer_engine": "Weight transfer not configured",
    "list_loras": "LoRA is not enabled",
}


@pytest.mark.parametrize("level", [1, 2])
def test_what_may_touch_weights_is_refused_while_they_sleep(llm, expected, level):
    before = llm.collective_rpc(total_of)
    llm.sleep(level=level)
    refused(llm, total_of)
    refused(llm, lambda worker: total_of(worker))
    refused(llm, "apply_model", (total,))
    with pytest.raises(SleepModeError, match="apply_model was not run"):
        llm.apply_model(total)
    for method in ("get_encoder_timing_stats", "checkpoint_prepare", "no_such_method"):
        refused(llm, method)
    # An in-process engine's executor can be called directly as well.
    with pytest.raises(SleepModeError, match="total_of was not run"):
        llm.llm_engine.model_executor.collective_rpc(total_of)
    assert not ran
    for method, tags in policy.NEEDS.items():
        asleep = ", ".join(tags)
        words = rf"{method} needs memory that is asleep \({asleep}\); call wake_up\(tags="
        with pytest.raises(SleepModeError, match=words):
            llm.collective_rpc(method)
    assert llm.collective_rpc(device_index) == [0]

    llm.wake_up(tags=["kv_cache"])
    with pytest.raises(SleepModeError, match="total_of was not run: weights are asleep"):
        llm.collective_rpc(total_of)
    llm.wake_up()
    if level == 2:
        llm.collective_rpc("reload_weights")
    assert llm.collective_rpc(total_of) == llm.apply_model(total) == before
    llm.reset_prefix_cache()
    assert few(llm) == expected


def test_what_is_safe_runs_while_all_sleeps(llm, expected):
    llm.sleep(level=1)
    for method in policy.SAFE_CALLS:
        if method in ("wake_up", "shutdown"):
            continue
        words = NEEDS_AN_OPTION.get(method)
        with pytest.raises(RuntimeError, match=words) if words else nullcontext():
            llm.collective_rpc(method, args=ARGUMENTS.get(method, ()))
        assert llm.llm_engine.is_sleeping()
    assert "Qwen2ForCausalLM" in repr(llm)
    llm.collective_rpc("wake_up")
    assert few(llm) == expected


def test_a_trainer_reaches_the_weights_while_the_cache_alone_sleeps(llm, tiny_model, expected):
    weights = list(load_file(tiny_model / "model.safetensors").items())

    def update(worker) -> None:
        worker.model_runner.model.load_weights(weights)

    llm.sleep(level=2)
    refused(llm, update)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc(update)
    assert len(llm.apply_model(total)) == 1
    for method in policy.NEEDS_ALL:
        with pytest.raises(SleepModeError, match=rf"{method} needs memory .* \(kv_cache\)"):
            llm.collective_rpc(method)
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    assert few(llm) == expected

    llm.sleep(level=0)
    llm.collective_rpc(total_of)
    llm.release_kv_cache_memory()
    llm.collective_rpc(total_of)
    llm.wake_up()
    assert few(llm) == expected


def test_a_wake_that_is_not_finished_refuses_too(llm, expected):
    llm.sleep(level=1)
    hooks = driver_worker(llm)._sleep_hooks
    finish, hooks.after_wake = hooks.after_wake, lambda: 1 / 0
    try:
        with pytest.raises(ZeroDivisionError):
            llm.wake_up()
        refused(llm, total_of)
        llm.collective_rpc("sleep_status")
    finally:
        hooks.after_wake = finish
    llm.wake_up()
    llm.collective_rpc(total_of)
    assert few(llm) == expected


def test_the_option_allows_what_is_not_known_to_use_weights(tiny_model, expected):
    config = {"sleep_mode": {"calls_while_asleep": "allow"}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        llm.sleep(level=1)
        assert llm.collective_rpc(lambda worker: worker.rank) == [0]
        assert llm.apply_model(lambda model: type(model).__name__) == ["Qwen2ForCausalLM"]
        with pytest.raises(SleepModeError, match=r"reload_weights needs memory .*\(weights\)"):
            llm.collective_rpc("reload_weights")
        llm.wake_up()
        assert few(llm) == expected
