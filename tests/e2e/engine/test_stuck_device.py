# SPDX-License-Identifier: Apache-2.0
"""torch's work hangs: nothing waits for it longer than ``device_timeout_s``."""

from collections.abc import Callable, Iterator

import pytest
from helpers.engine import driver_worker, engine, few, mapped
from helpers.stuck_copy import StuckCopy, let_go

from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory import pool


@pytest.fixture(scope="module")
def llm(tiny_model) -> Iterator[object]:
    options = {"sleep_mode": {"device_timeout_s": 0.5}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=options) as llm:
        yield llm


@pytest.fixture
def stuck() -> Iterator[Callable[[], None]]:
    """Launches a copy by torch that hangs until the test ends or releases it."""
    copy = StuckCopy()
    yield copy.launch
    let_go()
    assert copy.has_arrived()


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_gives_up_and_can_be_repeated(llm, stuck, expected, level: int) -> None:
    awake = mapped()
    stuck()
    with pytest.raises(SleepModeError, match=r"has not ended after 500 ms \(device_timeout_s\)"):
        llm.sleep(level=level)
    assert mapped() == awake
    assert not llm.llm_engine.is_sleeping()
    let_go()
    assert few(llm) == expected
    llm.sleep(level=level)
    assert mapped() == 0
    llm.wake_up(tags=["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up()
    assert few(llm) == expected


def test_a_wake_gives_up_and_can_be_repeated(llm, stuck, expected) -> None:
    llm.sleep(level=1)
    stuck()
    with pytest.raises(SleepModeError, match="device_timeout_s"):
        llm.wake_up()
    assert mapped() == 0
    assert llm.llm_engine.is_sleeping()
    let_go()
    llm.wake_up()
    assert few(llm) == expected


def test_work_that_comes_between_is_waited_for_as_long(llm, stuck, expected, monkeypatch) -> None:
    """After vLLM's own wait, when the memory is already awake."""
    worker, awake = driver_worker(llm), mapped()
    with monkeypatch.context() as patch:
        patch.setattr(worker._sleep_hooks, "before_sleep", stuck)
        with pytest.raises(SleepModeError, match="device_timeout_s"):
            llm.sleep(level=1)
    assert mapped() == awake
    let_go()
    llm.sleep(level=1)

    resume = worker.sleep_mode_backend.resume
    with monkeypatch.context() as patch:
        patch.setattr(worker.sleep_mode_backend, "resume", lambda tags: (resume(tags), stuck()))
        with pytest.raises(SleepModeError, match="device_timeout_s"):
            llm.wake_up()
    assert mapped() == awake
    assert llm.llm_engine.is_sleeping()  # the wake is not complete
    let_go()
    llm.wake_up()
    assert few(llm) == expected


def test_trimming_gives_up(llm, stuck) -> None:
    stuck()
    with pytest.raises(SleepModeError, match="device_timeout_s"):
        pool.trim()


def test_a_release_of_the_kv_cache_gives_up_and_can_be_repeated(llm, stuck, expected) -> None:
    cache = mapped("kv_cache")
    llm.sleep(level=0)  # only a pause
    stuck()
    with pytest.raises(SleepModeError, match="device_timeout_s"):
        llm.llm_engine.release_kv_cache_memory()
    assert mapped("kv_cache") == cache
    let_go()
    llm.llm_engine.release_kv_cache_memory()
    assert mapped("kv_cache") == 0
    llm.wake_up()
    assert few(llm) == expected
