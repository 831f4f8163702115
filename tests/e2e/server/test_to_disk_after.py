# SPDX-License-Identifier: Apache-2.0
"""A server that moves its backup to disk by itself when it has slept for long."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults import set_faults
from helpers.patience import wait_for
from helpers.server import MEMORY, SMALL, InBackground, Server

AFTER_S = 0.5
STAYS = "The backup stays in host memory"
# The commit of a move frees host memory: held until the rules change.
HELD_FREE = "aclrtFreeHost:1:delay_ms=60000:*,aclrtHostUnregister:1:delay_ms=60000:*"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def server(tiny_model, directory, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    faults = folder / "faults"
    faults.touch()
    options = {
        "backup_dir": str(directory),
        "to_disk_after_s": AFTER_S,
        "wake_on_request": True,
        "keep_host_backup": False,  # so that each move needs a new file
    }
    with Server(
        tiny_model,
        *(*SMALL, *MEMORY, "--enable-sleep-mode"),
        *("--additional-config", json.dumps({"sleep_mode": options})),
        log=folder / "log",
        env={
            "VLLM_SERVER_DEV_MODE": "1",
            "NPU_SIM_MACHINE": f"to-disk-{os.getpid()}",
            "NPU_SIM_FAULTS_FILE": str(faults),
        },
    ) as server:
        server.faults = faults
        yield server


@pytest.fixture(autouse=True)
def awake(server: Server) -> Iterator[str]:
    """What it answers, before and after each test."""
    text = server.complete()
    yield text
    set_faults(server.faults, "")
    server.post("/wake_up")
    assert server.complete() == text


def lies(server: Server) -> dict[str, int]:
    return server.rank_status()["backups"]


def is_on_disk(server: Server) -> bool:
    backups = lies(server)
    return backups["host"] == 0 < backups["disk"]


def said(server: Server, text: str) -> int:
    return server.log.read_text().count(text)


def moves(server: Server) -> int:
    return said(server, "the backup moves to disk.")


def test_it_moves_once_and_wakes_from_the_disk(server, awake) -> None:
    before = moves(server)
    server.post("/sleep?level=1")
    assert lies(server)["host"] > 0
    wait_for(lambda: is_on_disk(server), "it moves")
    assert server.rank_status()["host_backup"] == 0
    assert moves(server) == before + 1
    time.sleep(3 * AFTER_S)
    assert moves(server) == before + 1
    assert server.complete() == awake  # which wakes it
    assert lies(server) == {"host": 0, "disk": 0}


def test_the_time_begins_anew_with_a_move_of_its_user(server) -> None:
    server.post("/sleep?level=1&to=disk")
    before = moves(server)
    server.post("/sleep?level=1&to=host")
    assert lies(server)["disk"] == 0
    wait_for(lambda: is_on_disk(server), "it moves again")
    assert moves(server) == before + 1


def test_what_is_not_asleep_at_level_1_does_not_move(server) -> None:
    before = moves(server)
    server.post("/sleep?level=1")
    server.post("/wake_up")
    server.post("/sleep?level=2")
    time.sleep(3 * AFTER_S)
    server.post("/wake_up?tags=weights")
    server.post("/collective_rpc", json={"method": "reload_weights"})
    server.post("/wake_up")
    server.post("/sleep?level=1")
    server.post("/wake_up?tags=kv_cache")
    time.sleep(3 * AFTER_S)
    assert server.rank_status()["tags"]["kv_cache"]["mapped"] > 0
    assert moves(server) == before


def test_a_request_that_comes_during_a_move_follows_it(server, awake) -> None:
    before = moves(server)
    set_faults(server.faults, HELD_FREE)
    server.post("/sleep?level=1")
    wait_for(lambda: moves(server) > before, "it moves")
    request = InBackground(
        server,
        "/v1/completions",
        json={"model": server.model, "prompt": "The future of AI is", "max_tokens": 8},
    )
    wake = InBackground(server, "/wake_up")
    time.sleep(0.2)
    assert not request.is_done() and not wake.is_done()
    set_faults(server.faults, "")
    assert request.answer().status_code == 200
    assert wake.answer().status_code == 200
    assert lies(server) == {"host": 0, "disk": 0}


def test_a_failure_is_told_once_and_tried_again(server, directory) -> None:
    before = said(server, STAYS)
    directory.rmdir()
    server.post("/sleep?level=1")
    wait_for(lambda: said(server, STAYS) > before, "it says so")
    attempts = moves(server)
    wait_for(lambda: moves(server) > attempts, "it tries again")
    assert said(server, f"the free space of {directory} (backup_dir) cannot be read") >= 1
    assert said(server, STAYS) == before + 1
    assert lies(server)["disk"] == 0
    directory.mkdir()
    wait_for(lambda: is_on_disk(server), "it moves")
