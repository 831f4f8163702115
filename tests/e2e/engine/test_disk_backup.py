# SPDX-License-Identifier: Apache-2.0
"""Level 1 with ``host_backup="disk"``: tokens, bytes, and what a killed server leaves."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import MIB
from helpers.cli import vllm_sleep
from helpers.disk import nameless_files, spoil
from helpers.engine import engine, few, only_rank
from helpers.reference import hf_few
from helpers.server import MEMORY, SMALL, Server

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import DiskError, SleepModeError

BLOCKS_MIB = 32


def options(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "host_backup": "disk",
        "backup_dir": str(directory),
        "disk_blocks_mib": BLOCKS_MIB,
        **more,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def llm(tiny_model, directory) -> Iterator[Any]:
    config = {"sleep_mode": options(directory, chunk_mib=2)}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        yield llm
    assert list(directory.iterdir()) == []


def test_tokens_and_bytes(llm, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    for cycle in range(2):
        assert few(llm) == expected
        weights = only_rank(llm)["tags"]["weights"]["mapped"]
        llm.sleep(level=1)
        rank = only_rank(llm)
        usage = rank["tags"]["weights"]
        assert (usage["offloaded"], usage["disk"], usage["host"]) == (weights, weights, 0)
        assert usage["device"] == rank["host_backup"] == 0
        disk = rank["disk_backup"]
        assert disk["directory"] == str(directory)
        assert disk["bytes"] == sum(tag["disk"] for tag in rank["tags"].values()) >= weights
        assert 0 < disk["blocks"] == _camem.pinned_host_bytes() <= BLOCKS_MIB * MIB
        assert _camem.plain_host_bytes() == 0
        assert list(directory.iterdir()) == []
        assert len(nameless_files(directory)) == 1
        llm.wake_up()
        moved = rank["last_operation"]["tags"]["weights"]
        assert moved["offloaded"] == weights
        assert moved["written"] == (weights if cycle == 0 else 0)  # the file has it already
        assert only_rank(llm)["last_operation"]["tags"]["weights"]["restored"] == weights
        assert _camem.pinned_host_bytes() == 0
    assert few(llm) == expected


def test_wake_by_tags_and_level_2_from_level_1(llm, tiny_model) -> None:
    expected = hf_few(tiny_model)
    llm.sleep(level=1)
    llm.wake_up(tags=["weights"])
    assert only_rank(llm)["tags"]["kv_cache"]["discarded"] > 0
    llm.wake_up(tags=["kv_cache"])
    assert few(llm) == expected
    llm.sleep(level=1)
    llm.sleep(level=2)
    assert only_rank(llm)["tags"]["weights"]["disk"] == 0
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    assert few(llm) == expected


def test_a_backup_that_changed_is_not_served(llm, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    llm.sleep(level=1)
    assert spoil(directory) > 0
    for _ in range(2):
        with pytest.raises(DiskError, match=r"not what was written.*same call can be repeated"):
            llm.wake_up()
        assert only_rank(llm)["tags"]["weights"]["mapped"] == 0
        assert only_rank(llm)["last_error"]["type"] == "DiskError"
    with pytest.raises(SleepModeError):
        few(llm)
    spoil(directory)
    llm.wake_up()
    assert few(llm) == expected


def test_level_2_reads_nothing_of_a_disk_that_fails(llm, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    llm.sleep(level=1)
    spoil(directory)
    with pytest.raises(DiskError, match=r"tag 'weights'.*sleep at level 2"):
        llm.wake_up()
    llm.sleep(level=2)
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    assert few(llm) == expected


def test_a_killed_server_leaves_no_file(tiny_model, tmp_path) -> None:
    backups = tmp_path / "backups"
    backups.mkdir()
    config = {"sleep_mode": options(backups)}
    with Server(
        tiny_model,
        *(*SMALL, *MEMORY, "--enable-sleep-mode"),
        *("--additional-config", json.dumps(config)),
        log=tmp_path / "log",
        env={"VLLM_SERVER_DEV_MODE": "1"},
    ) as server:
        text = server.complete()
        server.post("/sleep?level=1")
        metrics = server.http.get("/metrics").text
        (gauge,) = (
            line
            for line in metrics.splitlines()
            if line.startswith("vllm:sleep_mode_held_bytes")
            and 'tag="weights"' in line
            and 'location="disk"' in line
        )
        assert float(gauge.split()[-1]) == server.rank_status()["tags"]["weights"]["disk"] > 0
        status = vllm_sleep("status", f"http://127.0.0.1:{server.port}").stdout
        held = "weights 0 MiB on the device and 0 MiB on the host"
        assert re.search(rf"{held} and [1-9]\d* MiB on disk", status), status
        server.post("/wake_up")
        assert server.complete() == text
        server.post("/sleep?level=1")
        engine_process = server.engine()
        assert len(nameless_files(backups, engine_process.pid)) == 1
        assert list(backups.iterdir()) == []
        engine_process.send_signal(signal.SIGKILL)
        psutil.wait_procs([engine_process], timeout=60)
    assert list(backups.iterdir()) == []
    open_files = (
        file
        for process in psutil.process_iter()
        for file in _nameless_files_of(backups, process.pid)
    )
    assert list(open_files) == []


def _nameless_files_of(directory: Path, pid: int) -> list[Path]:
    try:
        return nameless_files(directory, pid)
    except OSError:  # it has ended meanwhile, or is another user's
        return []
