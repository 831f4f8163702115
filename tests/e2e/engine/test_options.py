# SPDX-License-Identifier: Apache-2.0
"""The options of ``additional_config={"sleep_mode": ...}`` in a real engine."""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
from helpers.engine import engine, few, only_rank
from helpers.patience import wait_for
from helpers.ranks import assert_all, status
from helpers.reference import hf_few

from vllm_sleep_ascend import _camem, safe_while_asleep
from vllm_sleep_ascend.errors import SleepModeError, WeightsError


def last_sleep(llm) -> dict[str, dict[str, int]]:
    """Bytes by tag of the last operation of the only worker."""
    return only_rank(llm)["last_operation"]["tags"]


@pytest.mark.parametrize(
    "options",
    [
        {"host_backup": "prepared"},
        {"skip_unchanged": True},
        {"verify_wake": True},
        {"keep_host_backup": False, "chunk_mib": 2},
    ],
    ids=str,
)
def test_tokens_and_bytes(tiny_model, options):
    expected = hf_few(tiny_model)
    config = {"sleep_mode": options}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        if "host_backup" in options:
            assert _camem.wait_prepared(30)
        moved = []
        for _ in range(2):
            steps = _camem.host_memory()["steps"]
            assert few(llm) == expected
            # Preparation slows down during each of them.
            assert _camem.host_memory()["steps"] - steps >= max(map(len, expected))
            llm.sleep(level=1)
            moved.append(last_sleep(llm)["weights"])
            llm.wake_up()
        assert moved[0]["offloaded"] > 0
        # An earlier engine's rotary tables stay in the process, and may be backed up already.
        total = moved[0]["offloaded"] + moved[0]["unchanged"]
        skips = "skip_unchanged" in options or "verify_wake" in options
        assert moved[1]["unchanged"] == (total if skips else 0)
        assert moved[1]["offloaded"] == (0 if skips else total)
        assert (_camem.pinned_host_bytes() == 0) == (options.get("keep_host_backup") is False)
        assert few(llm) == expected


def change_every_backup(first: int | None = None) -> int:
    """Invert all bytes of the backups, or the ``first`` ones; a second call restores them.

    Backups are the anonymous memory that a forked child does not inherit. Returns their bytes.
    """
    total = 0
    _camem.prepare([])  # waits until the background has freed its blocks
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        header, flags = block.split("\n", 1)[0].split(), block.rsplit("VmFlags:", 1)[1].split()
        if len(header) > 5 or "dc" not in flags or "wr" not in flags:
            continue
        start, end = (int(address, 16) for address in header[0].split("-"))
        content = numpy.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
        content[:first] ^= 0x5A
        total += end - start
    return total


def test_a_backup_that_changed_is_found_and_not_served(tiny_model):
    expected = hf_few(tiny_model)
    config = {"sleep_mode": {"verify_wake": True, "after_level2": "refuse"}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        llm.sleep(level=1)
        assert change_every_backup() >= _camem.pinned_host_bytes() > 0
        with pytest.raises(WeightsError, match=r"tag .weights.*checksum.*Load the weights again"):
            llm.wake_up()
        with pytest.raises(SleepModeError):
            few(llm)
        llm.collective_rpc("reload_weights")
        llm.wake_up()
        assert few(llm) == expected

        # A load repairs this: the memory has its old checksum, but the backup does not.
        llm.sleep(level=1)
        change_every_backup(first=1)
        with pytest.raises(WeightsError, match="Load the weights again"):
            llm.wake_up()
        llm.collective_rpc("reload_weights")
        llm.wake_up()
        llm.sleep(level=1)
        llm.wake_up()
        assert few(llm) == expected


@safe_while_asleep
def change_backups_of(worker, rank: int) -> None:
    if worker.rank == rank:
        assert change_every_backup() > 0


@safe_while_asleep
def set_model(worker, rank: int, path: str) -> None:
    if worker.rank == rank:
        worker.model_config.model = path


def test_what_a_rank_knew_of_its_weights_is_rolled_back_with_the_wake(tiny_model):
    expected = hf_few(tiny_model)
    config = {"sleep_mode": {"verify_wake": True, "after_level2": "reload"}}
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        additional_config=config,
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
    ) as llm:
        # Rank 0 has loaded its weights when rank 1 fails: it has to load them again.
        llm.sleep(level=2)
        llm.collective_rpc(set_model, args=(1, "/nowhere"))
        with pytest.raises(SleepModeError, match=r"rank 1, device 1: .*loaded from /nowhere"):
            llm.wake_up()
        assert_all(llm, "SUSPENDED")
        missing = [rank["parameters_without_content"] for rank in status(llm)]
        assert missing[0] == missing[1] > 20
        llm.collective_rpc(set_model, args=(1, str(tiny_model)))
        llm.wake_up()
        llm.reset_prefix_cache()
        assert few(llm) == expected

        # Rank 1 finds a wrong backup, and the right one at the retry, which succeeds.
        llm.sleep(level=1)
        llm.collective_rpc(change_backups_of, args=(1,))
        with pytest.raises(WeightsError, match=r"rank 1, device 1: .*checksum.*Repeat the wake"):
            llm.wake_up()
        assert_all(llm, "SUSPENDED")
        llm.collective_rpc(change_backups_of, args=(1,))
        llm.wake_up()
        assert few(llm) == expected


def test_a_long_transfer_says_how_far_it_is(llm, monkeypatch, caplog):
    from vllm_sleep_ascend.memory import progress
    from vllm_sleep_ascend.sim import control

    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    monkeypatch.setattr(progress.logger, "propagate", True)

    def lines() -> list[str]:
        return [r.getMessage() for r in list(caplog.records) if "goes on" in r.getMessage()]

    def let_go() -> None:
        wait_for(lambda: len(lines()) >= 2, "two lines of progress", 60)
        control.set_faults("")

    control.set_faults("aclrtMemcpyAsync:1:delay_ms=300000")  # or until it is released
    with caplog.at_level("INFO", logger=progress.logger.name), ThreadPoolExecutor() as pool:
        watching = pool.submit(let_go)
        llm.sleep(level=1)
        watching.result()
    assert all(re.search(r"sleep level 1 goes on: [\d.]+ GiB copied in", line) for line in lines())
