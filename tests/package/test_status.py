# SPDX-License-Identifier: Apache-2.0
"""The state and the level of an engine, computed from its ranks' status."""

import subprocess
import sys

import pytest

from vllm_sleep_ascend.status import RankStatus, TagUsage, level_of, state_of


def usage(**sizes: int) -> TagUsage:
    names = ("mapped", "offloaded", "discarded", "device", "host", "page_locked", "allocations")
    return {**dict.fromkeys(names, 0), **sizes}  # type: ignore[typeddict-item, return-value]


AWAKE, OFFLOADED, DISCARDED = usage(mapped=4), usage(offloaded=4), usage(discarded=4)


def rank(weights: TagUsage, kv_cache: TagUsage | None = None, missing: int = 0) -> RankStatus:
    tags = {"weights": weights} | ({} if kv_cache is None else {"kv_cache": kv_cache})
    return {
        "rank": 0,
        "engine": 0,
        "device": 0,
        "free": 8,
        "total": 16,
        "enabled": True,
        "tags": tags,
        "parameters_without_content": missing,
    }


WITHOUT_SLEEP_MODE: RankStatus = {
    "rank": 0,
    "engine": 0,
    "device": 0,
    "free": 8,
    "total": 16,
    "enabled": False,
}

CASES = {
    "awake": ([rank(AWAKE, AWAKE)], False, "awake", 0),
    "a pause": ([rank(AWAKE, AWAKE)], True, "paused", 0),
    "level 1": ([rank(OFFLOADED, DISCARDED)], True, "asleep", 1),
    "level 2": ([rank(DISCARDED, DISCARDED, 3)], True, "asleep", 2),
    "weights woken": ([rank(AWAKE, DISCARDED)], True, "partly_asleep", 0),
    "weights woken after level 2": ([rank(AWAKE, DISCARDED, 3)], True, "partly_asleep", 2),
    "nothing loaded after level 2": ([rank(AWAKE, AWAKE, 3)], False, "awake_without_weights", 2),
    "level 1 over weights that are lost": ([rank(OFFLOADED, DISCARDED, 3)], True, "asleep", 2),
    "an encoder": ([rank(OFFLOADED)], True, "asleep", 1),
    "one of two ranks": ([rank(AWAKE, AWAKE), rank(OFFLOADED, AWAKE)], True, "partly_asleep", 1),
    "ranks that differ": ([rank(OFFLOADED), rank(DISCARDED, missing=1)], True, "asleep", 2),
    "no sleep mode": ([WITHOUT_SLEEP_MODE], False, "awake", 0),
    "no sleep mode, paused": ([WITHOUT_SLEEP_MODE], True, "paused", 0),
}


@pytest.mark.parametrize(("ranks", "sleeps", "state", "level"), CASES.values(), ids=CASES)
def test_states_and_levels(ranks, sleeps: bool, state: str, level: int) -> None:
    assert (state_of(ranks, sleeps), level_of(ranks)) == (state, level)


def test_clients_need_neither_vllm_nor_torch() -> None:
    program = (
        "import sys; import vllm_sleep_ascend.client.sleep_client, vllm_sleep_ascend.status; "
        "print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"
