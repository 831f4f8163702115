# SPDX-License-Identifier: Apache-2.0
"""Two ranks with backups on one disk: they sleep and wake together or not at all."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import MIB
from helpers.disk import nameless_files, spoil
from helpers.engine import engine, few
from helpers.ranks import assert_all, status
from helpers.reference import hf_few

from vllm_sleep_ascend import safe_while_asleep
from vllm_sleep_ascend.errors import DiskError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def ranks(tiny_model, directory) -> Iterator[Any]:
    options = {"host_backup": "disk", "backup_dir": str(directory), "keep_host_backup": False}
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        additional_config={"sleep_mode": {**options, "disk_blocks_mib": 16}},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as llm:
        yield llm
    assert list(directory.iterdir()) == []


def limit_files(worker, rank: int, size: int) -> None:
    """Nothing larger can be written; Python ignores the signal."""
    if worker.rank == rank:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@safe_while_asleep
def spoil_file_of(worker, rank: int, directory: Path) -> int:
    return spoil(directory) if worker.rank == rank else 0


@safe_while_asleep
def files(worker, directory: Path) -> int:
    return len(nameless_files(directory))


def test_every_rank_sleeps_on_the_disk(ranks, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    assert few(ranks) == expected
    ranks.sleep(level=1)
    assert_all(ranks, "SUSPENDED")
    for rank in status(ranks):
        assert rank["tags"]["weights"]["disk"] == rank["tags"]["weights"]["offloaded"] > 0
        assert rank["host_backup"] == 0
        assert 0 < rank["disk_backup"]["blocks"] <= 16 * MIB
    assert list(directory.iterdir()) == []
    assert ranks.collective_rpc(files, args=(directory,)) == [1, 1]
    ranks.wake_up()
    assert few(ranks) == expected
    assert ranks.collective_rpc(files, args=(directory,)) == [0, 0]


def test_a_disk_that_fails_one_rank_leaves_all_awake(ranks, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    ranks.collective_rpc(limit_files, args=(1, MIB // 2))
    with pytest.raises(DiskError, match=r"rank 1.*preallocated.*File too large"):
        ranks.sleep(level=1)
    ranks.collective_rpc(limit_files, args=(1, resource.RLIM_INFINITY))
    assert_all(ranks, "RUNNING")
    assert ranks.collective_rpc(files, args=(directory,)) == [0, 0]
    assert few(ranks) == expected
    ranks.sleep(level=1)
    ranks.wake_up()
    assert few(ranks) == expected


def test_a_file_of_one_rank_that_changed_leaves_all_asleep(ranks, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    ranks.sleep(level=1)
    assert max(ranks.collective_rpc(spoil_file_of, args=(0, directory))) > 0
    for _ in range(2):
        with pytest.raises(DiskError, match=r"rank 0.*not what was written"):
            ranks.wake_up()
        assert_all(ranks, "SUSPENDED")
    ranks.collective_rpc(spoil_file_of, args=(0, directory))
    ranks.wake_up()
    assert few(ranks) == expected


def lies(ranks) -> list[dict[str, int]]:
    return [rank["backups"] for rank in status(ranks)]


def test_backups_of_all_ranks_move_together(ranks, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    ranks.sleep(level=1, to="host")
    in_host = lies(ranks)
    assert all(place["host"] > 0 and place["disk"] == 0 for place in in_host)
    ranks.sleep(level=1, to="disk")
    assert lies(ranks) == [{"host": 0, "disk": place["host"]} for place in in_host]
    assert [rank["host_backup"] for rank in status(ranks)] == [0, 0]
    assert ranks.collective_rpc(files, args=(directory,)) == [1, 1]
    ranks.sleep(level=1, to="host")
    assert lies(ranks) == in_host
    assert ranks.collective_rpc(files, args=(directory,)) == [0, 0]
    ranks.wake_up()
    assert few(ranks) == expected


def test_a_move_that_fails_on_one_rank_moves_none(ranks, tiny_model, directory) -> None:
    expected = hf_few(tiny_model)
    ranks.sleep(level=1, to="host")
    before = lies(ranks)
    ranks.collective_rpc(safe_limit, args=(1, MIB // 2))
    with pytest.raises(DiskError, match=r"failed on 1 of 2 ranks.*rank 1.*File too large"):
        ranks.sleep(level=1, to="disk")
    ranks.collective_rpc(safe_limit, args=(1, resource.RLIM_INFINITY))
    assert lies(ranks) == before
    assert ranks.collective_rpc(files, args=(directory,)) == [0, 0]
    ranks.sleep(level=1, to="disk")
    on_disk = lies(ranks)
    ranks.collective_rpc(spoil_file_of, args=(0, directory))
    with pytest.raises(DiskError, match=r"rank 0.*not what was written"):
        ranks.sleep(level=1, to="host")
    assert lies(ranks) == on_disk
    assert [rank["host_backup"] for rank in status(ranks)] == [0, 0]
    ranks.collective_rpc(spoil_file_of, args=(0, directory))
    ranks.wake_up()
    assert few(ranks) == expected


@safe_while_asleep
def safe_limit(worker, rank: int, size: int) -> None:
    limit_files(worker, rank, size)
