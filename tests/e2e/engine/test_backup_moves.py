# SPDX-License-Identifier: Apache-2.0
"""``sleep(to=...)``: backups go to disk or host memory, or move there while their engine sleeps."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import vllm_sleep
from helpers.disk import nameless_files, spoil
from helpers.engine import engine, few, only_rank
from helpers.reference import hf_few
from helpers.server import MEMORY, SMALL, Server

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import DiskError, SleepModeError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def llm(tiny_model, directory) -> Iterator[Any]:
    options = {"backup_dir": str(directory), "chunk_mib": 2, "keep_host_backup": False}
    config = {"sleep_mode": {**options, "disk_blocks_mib": 16}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        yield llm
    assert list(directory.iterdir()) == []


def held() -> int:
    """Host memory of backups; copies to plain memory also go through page-locked blocks."""
    blocks = _camem.host_memory()["staging"]
    return _camem.pinned_host_bytes() + _camem.plain_host_bytes() - blocks


def test_a_sleeping_engine_moves_to_disk_and_back(llm, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    assert few(llm) == expected
    llm.sleep(level=1)
    rank = only_rank(llm)
    size = rank["backups"]["host"]
    assert size == held() == rank["host_backup"] >= rank["tags"]["weights"]["offloaded"] > 0
    assert rank["backups"]["disk"] == 0
    llm.sleep(level=1, to="disk")
    rank = only_rank(llm)
    assert rank["backups"] == {"host": 0, "disk": size}
    assert held() == rank["host_backup"] == 0
    assert rank["disk_backup"]["bytes"] == size
    assert sum(tag["moved"] for tag in rank["last_operation"]["tags"].values()) == size
    assert len(nameless_files(directory)) == 1
    llm.sleep(level=1)  # without a place nothing moves
    assert only_rank(llm)["backups"] == {"host": 0, "disk": size}
    llm.sleep(level=1, to="host")
    assert only_rank(llm)["backups"] == {"host": size, "disk": 0}
    assert held() == size and nameless_files(directory) == []
    llm.sleep(level=1, to="disk")
    llm.wake_up()
    assert only_rank(llm)["backups"] == {"host": 0, "disk": 0}
    assert few(llm) == expected


def test_an_engine_that_is_awake_sleeps_to_the_place_itself(llm, tiny_model) -> None:
    llm.sleep(level=1, to="disk")
    rank = only_rank(llm)
    assert rank["backups"]["host"] == 0 < rank["backups"]["disk"]
    assert rank["last_operation"]["tags"]["weights"]["moved"] == 0
    llm.wake_up()
    llm.sleep(level=1)  # the place was that sleep's
    assert only_rank(llm)["backups"]["disk"] == 0
    llm.wake_up()
    assert few(llm) == hf_few(tiny_model)


def test_tags_and_level_2_after_a_move(llm, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    llm.sleep(level=1)
    llm.sleep(level=1, to="disk")
    llm.wake_up(tags=["weights"])
    assert only_rank(llm)["tags"]["weights"]["asleep_on_disk"] == 0
    llm.sleep(level=1, to="disk")  # the weights sleep again, to disk
    assert only_rank(llm)["tags"]["weights"]["asleep_on_disk"] > 0
    llm.wake_up(tags=["kv_cache"])
    llm.sleep(level=1, to="host")
    assert only_rank(llm)["backups"]["disk"] == 0
    llm.wake_up()
    assert few(llm) == expected
    llm.sleep(level=1)
    llm.sleep(level=1, to="disk")
    llm.sleep(level=2)
    assert only_rank(llm)["tags"]["weights"]["disk"] == 0
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    assert few(llm) == expected


def test_discarded_weights_have_no_backup_to_move(llm, tiny_model) -> None:
    llm.sleep(level=2)
    for place in ("disk", "host"):
        with pytest.raises(SleepModeError, match=r"weights were discarded \(level 2\)"):
            llm.sleep(level=1, to=place)
    assert only_rank(llm)["backups"]["disk"] == 0
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    assert few(llm) == hf_few(tiny_model)


def test_an_engine_whose_ranks_do_not_say_what_sleeps_counts_as_asleep(llm, monkeypatch) -> None:
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    stock = executor.collective_rpc

    def collective_rpc(method: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "sleeping_tags":
            raise RuntimeError("no answer")
        return stock(method, *args, **kwargs)

    monkeypatch.setattr(executor, "collective_rpc", collective_rpc)
    with pytest.raises(RuntimeError, match="no answer"):
        llm.sleep(level=1, to="disk")
    assert executor.is_sleeping
    monkeypatch.undo()
    llm.wake_up()
    assert only_rank(llm)["backups"] == {"host": 0, "disk": 0}


def test_an_executor_with_a_sleep_of_its_own_sleeps_to_the_place(llm, monkeypatch) -> None:
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    stock = type(executor).sleep
    own = type("Own", (type(executor),), {"sleep": lambda self, level=1: stock(self, level)})
    monkeypatch.setattr(executor, "__class__", own)
    llm.sleep(level=1, to="disk")
    assert only_rank(llm)["backups"]["host"] == 0 < only_rank(llm)["backups"]["disk"]
    llm.wake_up()
    llm.sleep(level=1)
    assert only_rank(llm)["backups"]["disk"] == 0
    llm.wake_up()


def test_buffers_outlive_a_file_that_is_spoilt(llm, tiny_model, directory) -> None:
    """They are in no checkpoint, and are saved before they depend on the disk."""
    expected = hf_few(tiny_model)
    llm.sleep(level=1)
    llm.sleep(level=1, to="disk")
    spoil(directory)
    with pytest.raises(DiskError, match="not what was written"):
        llm.wake_up()
    with pytest.raises(DiskError, match="not what was written"):
        llm.sleep(level=1, to="host")
    assert only_rank(llm)["backups"]["host"] == 0 < only_rank(llm)["backups"]["disk"]
    _lose_weights(llm)
    assert few(llm) == expected
    llm.sleep(level=1, to="disk")
    spoil(directory)
    _lose_weights(llm)
    assert few(llm) == expected


def _lose_weights(llm: Any) -> None:
    llm.sleep(level=2)
    llm.wake_up()
    llm.collective_rpc("reload_weights")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"level": 1, "to": "tape"}, "to='tape' is no place for backups; use one of host, disk"),
        ({"level": 2, "to": "disk"}, "to='disk' is where the backups of level 1 go"),
        ({"level": 0, "to": "host"}, "to='host' is where the backups of level 1 go"),
    ],
)
def test_a_wrong_place_is_named(llm, options, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        llm.sleep(**options)
    with pytest.raises(ValueError, match=reason):
        llm.llm_engine.sleep(**options)
    assert only_rank(llm)["state"] == "RUNNING"


def test_a_server_moves_its_backup(tiny_model, tmp_path) -> None:
    config = {"sleep_mode": {"backup_dir": str(tmp_path)}}
    with Server(
        tiny_model,
        *(*SMALL, *MEMORY, "--enable-sleep-mode"),
        *("--additional-config", json.dumps(config)),
        log=tmp_path / "log",
        env={"VLLM_SERVER_DEV_MODE": "1"},
    ) as server:
        url = f"http://127.0.0.1:{server.port}"
        text = server.complete()
        answer = server.http.post("/sleep?level=1&to=tape")
        assert answer.status_code == 400
        assert "use one of host, disk" in answer.json()["error"]["message"]
        server.post("/sleep?level=1")
        size = server.rank_status()["backups"]["host"]
        assert size > 0
        answer = server.http.post("/sleep?level=1&to=disk")
        assert answer.json() == {"status": "sleeping", "level": 1, "to": "disk"}
        assert server.rank_status()["backups"] == {"host": 0, "disk": size}
        assert _metric(server, "disk") == size and _metric(server, "host") == 0
        shown = vllm_sleep("status", url).stdout
        assert f"backup of {size / 2**20:.0f} MiB on disk" in shown
        moved = vllm_sleep("sleep", url, "--to", "host").stdout
        assert f"{url} sleeps at level 1, its backup in host memory" in moved
        assert server.rank_status()["backups"] == {"host": size, "disk": 0}
        assert _metric(server, "host") == size
        vllm_sleep("sleep", url, "--level", "1", "--to", "disk")
        assert server.rank_status()["backups"] == {"host": 0, "disk": size}
        server.post("/wake_up")
        assert server.complete() == text
        answer = server.http.post("/sleep", json={"level": 1, "mode": "wait", "to": "disk"})
        assert answer.status_code == 200
        assert server.rank_status()["backups"]["host"] == 0
        server.post("/wake_up")
        assert server.complete() == text


def _metric(server: Server, location: str) -> int:
    metrics = server.http.get("/metrics").text
    found = re.findall(rf'^vllm:sleep_mode_backup_bytes{{.*"{location}".*}} (\S+)$', metrics, re.M)
    return int(sum(map(float, found)))


def test_a_server_without_a_directory_says_which_option_it_needs(server) -> None:
    answer = server.http.post("/sleep?level=1&to=disk")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "ValueError"
    assert "to='disk' needs the option backup_dir" in error["message"]
    assert not server.is_sleeping()
    result = vllm_sleep("sleep", f"http://127.0.0.1:{server.port}", "--to", "disk", code=1)
    assert "needs the option backup_dir" in result.stderr
