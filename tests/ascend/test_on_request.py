# SPDX-License-Identifier: Apache-2.0
"""Beside vllm-ascend: an engine that sleeps by itself, and that requests wake."""

import asyncio
from typing import Any

import pytest
from helpers.async_engine import Request, async_llm, greedy, under_way
from helpers.faults import DRIVER_ERROR, set_faults

OPTIONS = {"sleep_mode": {"idle_sleep_s": 0.5, "wake_on_request": True}}
TOKENS = 8


@pytest.fixture(scope="module")
def idle(tiny_model, rules):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # other tests use the device
        yield from async_llm(tiny_model, rules, additional_config=OPTIONS, max_num_seqs=1)


async def falls_asleep(llm: Any) -> None:
    while not await llm.is_sleeping():
        await asyncio.sleep(0.05)


async def tokens(llm: Any, name: str) -> list[int]:
    return (await Request(llm, name, TOKENS).run()).tokens


def test_it_sleeps_when_it_is_idle_and_a_request_wakes_it(tiny_model, idle):
    llm, run = idle
    expected = greedy(tiny_model)[:TOKENS]
    for turn in range(3):
        assert run(tokens(llm, f"turn-{turn}")) == expected
        run(falls_asleep(llm))


def test_requests_that_it_sleeps_over_get_the_failure_of_the_wake(tiny_model, idle, rules):
    from vllm_sleep_ascend.engine.refusals import NotServingError
    from vllm_sleep_ascend.front_end.replicas import call_all

    llm, run = idle

    async def meet() -> list[Any]:
        _, seat = await under_way(llm, "seat")
        set_faults(rules, f"aclrtMapMem:1:{DRIVER_ERROR}:*")
        asleep = asyncio.create_task(llm.sleep(mode="wait"))
        while not asleep.done() and not any(await call_all(llm.engine_core, "sleep_mode_pending")):
            await asyncio.sleep(0)
        waiting = [asyncio.create_task(tokens(llm, f"waiting-{number}")) for number in range(3)]
        await asyncio.gather(asleep, seat)
        return await asyncio.gather(*waiting, return_exceptions=True)

    for found in run(meet()):
        error = found.__cause__ or found  # vLLM 0.23 names it EngineGenerateError
        assert isinstance(error, NotServingError)
        assert str(error).startswith("the engine sleeps, and a request could not wake it: ")
    set_faults(rules, "")
    run(llm.wake_up())
    assert run(tokens(llm, "then")) == greedy(tiny_model)[:TOKENS]
