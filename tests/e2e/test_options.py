# SPDX-License-Identifier: Apache-2.0
"""The options of ``additional_config={"sleep_mode": ...}`` in a real engine."""

import ctypes
import re
from pathlib import Path

import pytest
from engines import engine
from reference import PROMPTS, hf_greedy, vllm_greedy

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError, WeightsError

TOKENS = 6


def last_sleep(llm) -> dict[str, dict[str, int]]:
    """Bytes by tag of the last operation of the one worker."""
    (status,) = llm.collective_rpc("sleep_status")
    return status["last_operation"]["tags"]


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
    expected = hf_greedy(tiny_model, PROMPTS[:2], TOKENS)
    config = {"sleep_mode": options}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        if "host_backup" in options:
            assert _camem.wait_prepared(30)
        moved = []
        for _ in range(2):
            assert vllm_greedy(llm, PROMPTS[:2], TOKENS) == expected
            llm.sleep(level=1)
            moved.append(last_sleep(llm)["weights"])
            llm.wake_up()
        assert moved[0]["offloaded"] > 0
        # An earlier engine's rotary tables live on in the process, perhaps backed up already.
        total = moved[0]["offloaded"] + moved[0]["unchanged"]
        skips = "skip_unchanged" in options or "verify_wake" in options
        assert moved[1]["unchanged"] == (total if skips else 0)
        assert moved[1]["offloaded"] == (0 if skips else total)
        assert (_camem.pinned_host_bytes() == 0) == (options.get("keep_host_backup") is False)
        assert vllm_greedy(llm, PROMPTS[:2], TOKENS) == expected


def flip_a_bit_of_every_backup() -> int:
    """Backups are the anonymous memory that a forked child does not get. Returns their bytes."""
    total = 0
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        header, flags = block.split("\n", 1)[0].split(), block.rsplit("VmFlags:", 1)[1].split()
        if len(header) > 5 or "dc" not in flags or "wr" not in flags:
            continue
        start, end = (int(address, 16) for address in header[0].split("-"))
        for address in range(start, end, 2 << 20):
            ctypes.c_uint8.from_address(address).value ^= 1
        total += end - start
    return total


def test_a_backup_that_changed_is_found_and_not_served(tiny_model):
    expected = hf_greedy(tiny_model, PROMPTS[:2], TOKENS)
    config = {"sleep_mode": {"verify_wake": True, "after_level2": "refuse"}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        llm.sleep(level=1)
        assert flip_a_bit_of_every_backup() >= _camem.pinned_host_bytes() > 0
        with pytest.raises(WeightsError, match=r"tag .weights.*checksum.*Load the weights again"):
            llm.wake_up()
        with pytest.raises(SleepModeError):
            vllm_greedy(llm, PROMPTS[:2], TOKENS)
        llm.collective_rpc("reload_weights")
        llm.wake_up()
        assert vllm_greedy(llm, PROMPTS[:2], TOKENS) == expected


def test_a_long_transfer_says_how_far_it_is(llm, monkeypatch, caplog):
    from vllm_sleep_ascend import progress
    from vllm_sleep_ascend.sim import control

    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    monkeypatch.setattr(progress.logger, "propagate", True)
    control.set_faults("aclrtMemcpyAsync:1:delay_ms=350")
    with caplog.at_level("INFO", logger=progress.logger.name):
        llm.sleep(level=1)
        lines = [r.getMessage() for r in caplog.records if "goes on" in r.getMessage()]
    control.set_faults("")
    llm.wake_up()
    assert len(lines) >= 2
    assert all(re.search(r"sleep level 1 goes on: [\d.]+ GiB copied in", line) for line in lines)
