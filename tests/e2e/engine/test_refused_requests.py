# SPDX-License-Identifier: Apache-2.0
"""``while_asleep="refuse"``: requests that have passed the front end's check when the engine goes
to sleep are refused as well, wherever they are; none waits for the wake."""

import asyncio

import pytest
from helpers.async_engine import PROMPT, Request, async_llm, greedy, held, serves, under_way
from helpers.patience import patience

from vllm_sleep_ascend.errors import SleepModeError


@pytest.fixture(scope="module")
def engine_process(tiny_model):
    """Two requests run at a time; others wait in the scheduler."""
    yield from async_llm(
        tiny_model,
        max_num_seqs=2,
        additional_config={"sleep_mode": {"while_asleep": "refuse"}},
    )


@pytest.fixture(scope="module")
def expected(tiny_model):
    return greedy(tiny_model)


async def refused(task: asyncio.Task) -> str:
    """The reason that the request's caller gets."""
    with pytest.raises(SleepModeError) as found:
        await asyncio.wait_for(task, 20 * patience())
    assert type(found.value).__name__ == "NotServingError"
    assert found.value.http_status == 503
    return str(found.value)


async def nothing_left(llm) -> None:
    assert llm.output_processor.get_num_unfinished_requests() == 0
    assert not llm.output_processor.parent_requests


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_requests_that_wait_in_the_scheduler(engine_process, expected, mode):
    llm, run = engine_process

    async def test():
        running = [await under_way(llm, f"running-{mode}-{n}") for n in range(2)]
        queued = [Request(llm, f"queued-{mode}-{n}", 12) for n in range(2)]
        twins = Request(llm, f"twins-{mode}", 12, n=2)
        waiting = [asyncio.create_task(request.run()) for request in (*queued, twins)]
        while llm.output_processor.get_num_unfinished_requests() < 6:
            await asyncio.sleep(0.01)
        await llm.collective_rpc("sleep_status")  # behind them in the engine's queue
        await llm.sleep(level=1, mode=mode)
        for task in waiting:
            assert "the engine sleeps; wake it with wake_up()" in await refused(task)
        assert set((await held(llm)).values()) == {0}
        late = asyncio.create_task(Request(llm, f"late-{mode}", 12).run())
        assert "the engine sleeps" in await refused(late)
        await llm.wake_up()
        for request, task in running:
            await asyncio.wait_for(task, 60 * patience())
            assert request.reason == ("abort" if mode == "abort" else "length")
            assert request.tokens == expected[: len(request.tokens)]
        await nothing_left(llm)
        await serves(llm, expected)

    run(test())


@pytest.mark.parametrize("level", [0, 1])
def test_a_request_that_reaches_the_engine_after_the_sleep(engine_process, expected, level):
    """It has passed the front end's check: here as a session, whose input comes later."""
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    llm, run = engine_process
    params = SamplingParams(temperature=0, max_tokens=12, output_kind=RequestOutputKind.DELTA)

    async def test():
        asleep = asyncio.Event()

        async def late_input():
            await asleep.wait()
            yield StreamingInput(PROMPT)

        async def session():
            async for _ in llm.generate(late_input(), params, f"session-{level}"):
                pass

        task = asyncio.create_task(session())
        await llm.collective_rpc("sleep_status")
        await llm.sleep(level=level)
        asleep.set()
        assert "the engine sleeps" in await refused(task)
        await llm.wake_up()
        await nothing_left(llm)
        await serves(llm, expected)

    run(test())


def test_requests_all_around_a_sleep_end(engine_process, expected):
    """With tokens, aborted or refused; the tokens of accepted requests are right."""
    llm, run = engine_process

    async def test():
        requests = [Request(llm, f"around-{n}", 12) for n in range(24)]
        tasks = []
        for number, request in enumerate(requests):
            tasks.append(asyncio.create_task(request.run()))
            if number == 12:
                sleep = asyncio.create_task(llm.sleep(level=1, mode="wait"))
            await asyncio.sleep(0)
        outcomes = await asyncio.wait_for(
            asyncio.gather(*tasks, return_exceptions=True), 60 * patience()
        )
        await sleep
        served = [outcome for outcome in outcomes if isinstance(outcome, Request)]
        others = [outcome for outcome in outcomes if not isinstance(outcome, Request)]
        assert all(type(error).__name__ == "NotServingError" for error in others)
        assert all(request.tokens == expected[:12] for request in served)
        assert others
        await llm.wake_up()
        await nothing_left(llm)
        await serves(llm, expected)

    run(test())


def test_a_paused_engine_says_how_it_goes_on(engine_process, expected):
    llm, run = engine_process

    async def test():
        await llm.pause_generation()
        await llm.sleep(level=1)
        await llm.wake_up()
        late = asyncio.create_task(Request(llm, "paused", 12).run())
        assert "the engine is paused; resume it with" in await refused(late)
        await llm.resume_generation()
        await serves(llm, expected)

    run(test())
