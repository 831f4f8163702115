# SPDX-License-Identifier: Apache-2.0
"""Other processes allocate and free device memory while an engine starts, sleeps or wakes."""

import logging
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import MIB
from helpers.engine import _clean_up, engine, few, mapped
from helpers.neighbours import Neighbour, wrap_start
from helpers.patience import patience, wait_for
from helpers.server import SMALL, Server

from vllm_sleep_ascend.errors import DeviceOutOfMemoryError
from vllm_sleep_ascend.memory.backend import CamemBackend
from vllm_sleep_ascend.memory.pool import release_pools
from vllm_sleep_ascend.sim import control

DEVICE = 2048  # MiB
SHARE = DEVICE // 4
OPTIONS = {"enable_sleep_mode": True, "kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.25}

STEP = 60
MOST = 24 * STEP  # leaves more than the share
STORIES = {
    "freed": lambda moment: max(0, MOST - moment * STEP),
    "taken": lambda moment: min(MOST, moment * STEP),
    "both": lambda moment: MOST * (moment % 2),
}

NO_ACCOUNT = "aclrtGetMemUsageInfo:1:207000:*"  # a chip without per-process accounting

LEFT_BEHIND = 128  # blocks: an engine leaves up to 4 MiB in this process


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    process = Neighbour()
    yield process
    process.end()


@pytest.fixture(scope="module")
def quiet(tiny_model) -> int:
    """The blocks of a start without other processes."""
    with engine(tiny_model, **OPTIONS) as llm:
        return blocks(llm)


@pytest.fixture
def sleep_log() -> Iterator[list[str]]:
    """The worker's log messages about its sleeps."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_sleep_ascend.rank.sleeping")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def blocks(llm) -> int:
    """Of its KV cache."""
    return llm.llm_engine.vllm_config.cache_config.num_gpu_blocks


def waiting(seconds: float) -> dict:
    return {"additional_config": {"sleep_mode": {"wake_timeout_s": seconds}}}


def until_asked(neighbour: Neighbour, call: str) -> threading.Thread:
    """Take all memory, and free it after this process has failed to allocate a few times."""
    neighbour.take_all()
    before = control.call_count(call)

    def give_back() -> None:
        wait_for(lambda: control.call_count(call) > before + 5, f"{call} comes again")
        neighbour.hold(0)

    thread = threading.Thread(target=give_back)
    thread.start()
    return thread


@pytest.fixture
def refusing(request) -> Iterator[None]:
    """Fail calls of this process's simulated device."""
    control.set_faults(request.param)
    yield
    control.set_faults("")


@pytest.mark.parametrize(
    ("story", "refusing"),
    [
        pytest.param("freed", "", marks=pytest.mark.slow),
        pytest.param("taken", "", marks=pytest.mark.slow),
        ("both", ""),
        ("both", NO_ACCOUNT),
    ],
    ids=["freed", "taken", "both", "both-no-account"],
    indirect=["refusing"],
)
def test_a_start_bears_changes_at_every_moment(
    tiny_model, expected, quiet, neighbour, monkeypatch, story, refusing
):
    moments: list[str] = []
    neighbour.hold(STORIES[story](0))

    def change(moment: str) -> None:
        moments.append(moment)
        neighbour.hold(STORIES[story](len(moments)))

    wrap_start(change, monkeypatch.setattr)
    with engine(tiny_model, **OPTIONS) as llm:
        assert (moments[0], moments[-1]) == (
            "before init_device",
            "after compile_or_warm_up_model",
        )
        assert len(moments) == 22, moments
        assert abs(blocks(llm) - quiet) <= LEFT_BEHIND
        assert mapped() < SHARE * MIB
        assert few(llm) == expected


def test_start_sleep_and_wake_wait_for_memory_that_comes_back(
    tiny_model, expected, quiet, neighbour, monkeypatch, sleep_log
):
    threads = [until_asked(neighbour, "aclrtGetMemInfo")]
    calls = {
        "before determine_available_memory": "aclrtGetMemInfo",
        "after profile_run": "aclrtGetMemInfo",
        "before initialize_kv_cache_tensors": "aclrtMallocPhysical",
    }

    def take(moment: str) -> None:
        if moment in calls:
            threads[-1].join()
            threads.append(until_asked(neighbour, calls[moment]))

    wrap_start(take, monkeypatch.setattr)
    with engine(tiny_model, **OPTIONS, **waiting(60 * patience())) as llm:
        assert len(threads) == 4
        assert abs(blocks(llm) - quiet) <= LEFT_BEHIND
        assert few(llm) == expected

        held = mapped()
        suspend = CamemBackend.suspend

        def suspend_beside_a_neighbour(backend: CamemBackend, *args: Any) -> None:
            suspend(backend, *args)
            threads.append(until_asked(neighbour, "aclrtMallocPhysical"))

        monkeypatch.setattr(CamemBackend, "suspend", suspend_beside_a_neighbour)
        llm.sleep(level=1)
        (line,) = sleep_log
        came_free = float(re.search(r"gave back (\S+) GiB", line)[1])
        assert came_free == pytest.approx((held - mapped()) / 1024 / MIB, abs=0.01)
        llm.wake_up()
        assert mapped() == held
        assert few(llm) == expected
    for thread in threads:
        thread.join()


def test_a_cache_takes_no_more_than_is_free(tiny_model, expected, quiet, neighbour, monkeypatch):
    taken = DEVICE - SHARE // 2

    def take(moment: str) -> None:
        if moment == "before profile_run":
            neighbour.hold(taken)

    wrap_start(take, monkeypatch.setattr)
    with engine(tiny_model, **OPTIONS) as llm:
        assert 0 < blocks(llm) < quiet // 2
        assert SHARE * MIB // 8 < mapped("kv_cache") < (DEVICE - taken) * MIB
        assert few(llm) == expected


@pytest.mark.parametrize(
    ("moment", "error", "words"),
    [
        ("before init_device", ValueError, "are needed to start, by gpu_memory_utilization=0.25"),
        ("before load_model", DeviceOutOfMemoryError, "no device memory for the weights"),
        ("before _dummy_run", DeviceOutOfMemoryError, "no device memory for the largest batch"),
        (  # after profiling, once torch has given back what it cached
            "before _run_largest_graph",
            DeviceOutOfMemoryError,
            "are left for the KV cache, which needs",
        ),
        (
            "before initialize_kv_cache_tensors",
            DeviceOutOfMemoryError,
            "no device memory for the KV cache",
        ),
    ],
)
def test_a_start_without_memory_says_who_holds_it_and_what_to_do(
    tiny_model, neighbour, monkeypatch, moment, error, words
):
    wrap_start(lambda now: neighbour.take_all() if now == moment else None, monkeypatch.setattr)
    try:
        with engine(tiny_model, **OPTIONS):
            raise AssertionError("it started")
    except (ValueError, DeviceOutOfMemoryError) as failed:
        kind, text = type(failed), str(failed)
    release_pools()
    _clean_up()
    assert kind is error
    assert words in text
    assert re.search(r"device 0: \d+ bytes free, \d+ held by this process, \d+ by others", text)
    assert "put the servers that share the device to sleep" in text
    assert "wake_timeout_s" in text


def test_a_server_sleeps_and_wakes_while_another_starts(tiny_model, tmp_path):
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"neighbours-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
    }
    options = ("--enable-sleep-mode", *SMALL, "--gpu-memory-utilization", "0.4")
    moments = ("before load_weights", "before _dummy_run", "after profile_run")
    stops = {"STOP_FOLDER": str(tmp_path), "STOP_MOMENTS": ",".join(moments)}
    extension = ("--worker-extension-cls", "helpers.neighbours.StopsAtMoments")

    def at(moment: str) -> Path:
        file = tmp_path / moment
        wait_for(file.exists, moment, 240)
        return file

    def start_b() -> Server:
        return Server(tiny_model, *options, *extension, log=tmp_path / "b", env={**env, **stops})

    def device_bytes(server: Server) -> dict[str, int]:
        return {tag: usage["device"] for tag, usage in server.rank_status()["tags"].items()}

    def cache_line(log: Path) -> list[str]:
        return re.findall(r"KV cache size: (\S+) tokens", log.read_text())

    with (
        Server(tiny_model, *options, log=tmp_path / "a", env=env) as a,
        ThreadPoolExecutor(1) as pool,
    ):
        text = a.complete()
        device = device_bytes(a)
        starting = pool.submit(start_b)
        stop = at("before load_weights")
        a.post("/sleep")
        stop.unlink()
        stop = at("before _dummy_run")
        a.post("/wake_up")
        assert a.complete() == text
        stop.unlink()
        stop = at("after profile_run")
        a.post("/sleep?level=1")
        stop.unlink()
        with starting.result() as b:
            assert b.complete() == text
            a.post("/wake_up")
            assert (a.complete(), b.complete()) == (text, text)
            assert device_bytes(a) == device
        assert cache_line(tmp_path / "a") == cache_line(tmp_path / "b") != []
