# SPDX-License-Identifier: Apache-2.0
"""Engines that a request wakes, with sleeps and requests at the same time."""

import asyncio
from typing import Any

import pytest
from helpers.async_engine import Request, async_llm, greedy, under_way
from helpers.engine import engine, few
from helpers.faults import DRIVER_ERROR, set_faults
from helpers.reference import hf_few

OPTIONS = {"sleep_mode": {"wake_on_request": True}}
SLOW_COPIES = "aclrtMemcpyAsync:1:delay_ms=20:*"
TOKENS = 8
SEQUENCES = 2  # computed at once


@pytest.fixture(scope="module")
def woken(tiny_model, rules):
    yield from async_llm(tiny_model, rules, additional_config=OPTIONS, max_num_seqs=SEQUENCES)


async def requests(llm: Any, name: str, count: int) -> list[Any]:
    """What each gets: its tokens, or the error that it raises."""

    async def ask(number: int) -> Any:
        request = await Request(llm, f"{name}-{number}", TOKENS).run()
        return request.tokens if request.reason == "length" else request.reason

    asked = (ask(number) for number in range(count))
    return await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_requests_that_a_sleep_overtakes_wake_it(tiny_model, woken, mode) -> None:
    """Wherever they are when it comes, and though most of them have not begun."""
    llm, run = woken
    expected = greedy(tiny_model)[:TOKENS]

    async def meet(turns: int) -> list[Any]:
        asked = asyncio.create_task(requests(llm, f"{mode}-{turns}", 3 * SEQUENCES))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        await llm.sleep(mode=mode)
        return await asked

    for turns in range(0, 40, 4):
        for found in run(meet(turns)):
            assert found == expected or (mode == "abort" and found == "abort")


def test_a_sleep_that_keeps_requests_is_ended_by_a_new_one(tiny_model, woken, rules) -> None:
    llm, run = woken
    expected = greedy(tiny_model)[:TOKENS]

    async def kept() -> tuple[bool, list[Any]]:
        set_faults(rules, SLOW_COPIES)
        request, running = await under_way(llm, "kept", 200)
        await llm.sleep(mode="keep")
        set_faults(rules, "")
        is_kept = not running.done() and await llm.is_sleeping()
        found = await requests(llm, "new", 1)
        await running
        return is_kept, [*found, request.tokens]

    is_kept, (new, tokens) = run(kept())
    assert is_kept
    assert new == expected
    assert tokens == greedy(tiny_model)[:200]


def test_requests_that_it_sleeps_over_get_the_failure_of_the_wake(tiny_model, woken, rules) -> None:
    from vllm_sleep_ascend.engine.refusals import NotServingError
    from vllm_sleep_ascend.front_end.replicas import call_all

    llm, run = woken

    async def meet() -> list[Any]:
        seats = [(await under_way(llm, f"seat-{number}"))[1] for number in range(SEQUENCES)]
        asleep = asyncio.create_task(llm.sleep(mode="wait"))
        while not asleep.done() and not any(await call_all(llm.engine_core, "sleep_mode_pending")):
            await asyncio.sleep(0)
        waiting = asyncio.create_task(requests(llm, "waiting", 3))
        await asleep
        await asyncio.gather(*seats)
        return await waiting

    set_faults(rules, f"aclrtMapMem:1:{DRIVER_ERROR}:*")
    for found in run(meet()):
        assert isinstance(found, NotServingError)
        assert str(found).startswith("the engine sleeps, and a request could not wake it: ")
    # What it ended leaves no work that it could not do asleep: a pause waits for all work.
    run(llm.pause_generation(mode="wait"))
    set_faults(rules, "")
    run(llm.wake_up())
    run(llm.resume_generation())
    assert run(requests(llm, "then", 1)) == [greedy(tiny_model)[:TOKENS]]


def test_requests_that_end_asleep_are_no_work(tiny_model, woken) -> None:
    """Those of clients that do not wait for the wake."""
    llm, run = woken

    async def leave() -> None:
        await llm.sleep(mode="keep")
        await llm.pause_generation(mode="keep")  # so that the request does not wake it
        request = asyncio.create_task(Request(llm, "leaves", TOKENS).run())
        while not llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0)
        # The engine has the request, which came before this call.
        (status,) = await llm.collective_rpc("sleep_status")
        assert status["tags"]["weights"]["offloaded"] > 0
        request.cancel()
        await asyncio.wait([request])
        await llm.pause_generation(mode="wait")
        await llm.wake_up()
        await llm.resume_generation()

    run(leave())
    assert run(requests(llm, "then", 1)) == [greedy(tiny_model)[:TOKENS]]


def test_calls_of_workers_and_requests_at_once(tiny_model, woken) -> None:
    """A trainer's calls beside requests, each of which finds the engine awake."""
    llm, run = woken

    async def both() -> list[Any]:
        asked = asyncio.create_task(requests(llm, "beside", 6))
        while not asked.done():
            await llm.collective_rpc("check_health")
            await llm.pause_generation(mode="keep")
            await llm.resume_generation()
        return await asked

    assert run(both()) == [greedy(tiny_model)[:TOKENS]] * 6


def test_generate_wakes_an_engine_in_this_process(tiny_model) -> None:
    from vllm_sleep_ascend.engine.refusals import NotServingError

    with engine(tiny_model, enable_sleep_mode=True, additional_config=OPTIONS) as llm:
        expected = hf_few(tiny_model)
        for _ in range(2):
            llm.sleep(level=1)
            assert few(llm) == expected
        llm.sleep(level=2)
        with pytest.raises(NotServingError, match="a request does not wake it with after_level2"):
            few(llm)
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        assert few(llm) == expected
