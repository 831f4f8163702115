# SPDX-License-Identifier: Apache-2.0
"""Beside vllm-ascend: backups on disk, and moves between host memory and disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.ascend_engine import engine
from helpers.disk import nameless_files
from helpers.engine import few, only_rank, sleep_and_wake


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def llm(tiny_model, directory) -> Iterator[Any]:
    options = {"sleep_mode": {"backup_dir": str(directory), "disk_blocks_mib": 16}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=options) as llm:
        yield llm


def test_a_backup_moves_to_disk_and_back_while_the_engine_sleeps(llm, expected, directory) -> None:
    assert few(llm) == expected
    llm.sleep(level=1)
    size = only_rank(llm)["backups"]["host"]
    assert size >= only_rank(llm)["tags"]["weights"]["offloaded"] > 0
    llm.sleep(level=1, to="disk")
    assert only_rank(llm)["backups"] == {"host": 0, "disk": size}
    assert len(nameless_files(directory)) == 1
    llm.sleep(level=1, to="host")
    assert only_rank(llm)["backups"] == {"host": size, "disk": 0}
    llm.sleep(level=1, to="disk")
    llm.wake_up()
    assert few(llm) == expected


def test_an_engine_that_is_awake_sleeps_to_disk(llm, expected, directory) -> None:
    llm.sleep(level=1, to="disk")
    backups = only_rank(llm)["backups"]
    assert backups["host"] == 0 < backups["disk"]
    llm.wake_up()
    assert few(llm) == expected
    sleep_and_wake(llm, 1)
    assert few(llm) == expected
