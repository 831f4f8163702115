# SPDX-License-Identifier: Apache-2.0
"""``host_backup``: when page-locked memory for the weights is allocated, and when it is freed."""

import logging
from collections.abc import Iterator

import pytest
import torch
from helpers import MIB
from helpers.allocator import Block
from helpers.logs import messages_of
from helpers.patience import wait_for

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.memory.backend import CamemBackend
from vllm_sleep_ascend.memory.pool import release_pools

SIZE = 8 * MIB


@pytest.fixture
def said() -> Iterator[list[str]]:
    with messages_of("memory.sleeping_memory", logging.INFO) as messages:
        yield messages


@pytest.fixture(autouse=True)
def weights() -> Iterator[Block]:
    """Awake, and without a backup."""
    torch.npu.set_device(0)
    block = Block("weights", SIZE)
    yield block
    backend().resume()
    intact = block.intact()
    block.free()
    _camem.release_prepared()
    assert intact and prepared() == 0


def backend(**options: object) -> CamemBackend:
    made = CamemBackend()
    made.configure(SleepModeConfig(host_memory="acl", **options))  # type: ignore[arg-type]
    return made


def prepared() -> int:
    assert _camem.wait_prepared(60)
    return _camem.host_memory()["prepared"]


def need(engine: CamemBackend) -> int:
    return engine.host_need({"weights": "offload"}, "keep")[0]


def ranks_for(engine: CamemBackend, times: float) -> int:
    """The number of ranks for which the host has this many times the memory that they need."""
    needed, available = engine.host_need({"weights": "offload"}, "keep")
    return int(available / times / needed)


def test_by_default_it_is_taken_ahead_and_said_once(said: list[str]) -> None:
    engine = backend()
    needed = need(engine)
    assert needed >= SIZE
    engine.prepare()
    assert prepared() == needed
    engine.prepare()
    gib = f"{needed / 2**30:.2f} GiB"
    assert said[0] == f"camem: preparing {gib} of page-locked host memory"
    told = [text for text in said if "page-locked host memory is that of aclrtMallocHost" in text]
    assert len(told) == 1 and "host_memory says so" in told[0]
    engine.suspend(1)
    assert _camem.host_memory()["prepared"] == 0  # it is the backup now
    assert _camem.pinned_host_bytes() >= needed


@pytest.mark.parametrize(("times", "taken"), [(1.5, False), (3, True)])
def test_by_default_only_where_the_host_has_twice_what_its_ranks_need(
    said: list[str], times: float, taken: bool
) -> None:
    engine = backend()
    needed, ranks = need(engine), ranks_for(engine, times)
    engine.prepare(ranks)
    assert prepared() == (needed if taken else 0)
    refusal = f"twice what {ranks} ranks need are {2 * ranks * needed / 2**30:.2f} GiB"
    assert any(refusal in text for text in said) is not taken


def test_asked_for_it_is_taken_whatever_the_host_has() -> None:
    engine = backend(host_backup="prepared")
    needed = need(engine)
    engine.prepare(ranks_for(engine, 0.5))
    assert prepared() == needed


@pytest.mark.parametrize("options", [{"host_backup": "on_demand"}, {"keep_host_backup": False}])
def test_where_no_backup_stays_nothing_is_taken_ahead(said: list[str], options: dict) -> None:
    engine = backend(**options)
    engine.prepare()
    assert (prepared(), said) == (0, [])
    engine.suspend(1)
    assert sum(a["host_bytes"] for a in _camem.allocations()) >= SIZE


def test_level_2_gives_back_what_nobody_asked_for(said: list[str], weights: Block) -> None:
    engine = backend()
    needed = need(engine)
    engine.prepare()
    assert prepared() == needed
    engine.suspend(2)
    assert prepared() == 0
    assert any("prepared host memory go back: level 2 does not need it" in text for text in said)
    engine.resume()
    weights.write(0)


def test_an_engine_that_ends_gives_it_back_although_a_tensor_lives_on(weights: Block) -> None:
    engine = backend(host_backup="prepared")
    engine.prepare()
    assert prepared() >= SIZE
    release_pools()
    wait_for(lambda: _camem.pinned_host_bytes() == 0)


def test_level_2_keeps_what_was_asked_for(weights: Block) -> None:
    engine = backend(host_backup="prepared")
    needed = need(engine)
    engine.prepare()
    assert prepared() == needed
    engine.suspend(2)
    assert prepared() == needed
    engine.resume()
    weights.write(0)
