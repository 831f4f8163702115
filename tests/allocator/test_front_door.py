# SPDX-License-Identifier: Apache-2.0
"""``vllm_sleep_ascend.memory`` in a program without vLLM, and beside an engine's memory."""

import gc
import os
import re
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import MIB, ROOT, programs
from helpers.allocator import Block
from helpers.machine import LAUNCHER, USUAL_MACHINE

from vllm_sleep_ascend import _camem, memory
from vllm_sleep_ascend.memory.backend import CamemBackend
from vllm_sleep_ascend.memory.pool import release_pools

SIZE = 4 * MIB


class Regions:
    """Two tensors in two regions."""

    def __init__(self) -> None:
        with memory.region("weights"):
            self.weights = torch.arange(SIZE, dtype=torch.uint8, device="npu")
        with memory.region("cache"):
            self.cache = torch.ones(SIZE, dtype=torch.uint8, device="npu")
        torch.npu.synchronize()

    def intact(self) -> bool:
        return bool((self.weights == torch.arange(SIZE, dtype=torch.uint8, device="npu")).all())


@pytest.fixture
def regions() -> Iterator[Regions]:
    torch.npu.set_device(0)
    made = Regions()
    yield made
    memory.wake()
    assert made.intact()
    del made.weights, made.cache
    gc.collect()
    release_pools()
    assert not any(a["tag"].startswith("program:") for a in _camem.allocations())


def device() -> dict[str, int]:
    return {tag: of["device"] for tag, of in memory.status().items()}


def test_regions_sleep_and_wake_by_tag(regions: Regions) -> None:
    awake = device()
    assert set(awake) == {"weights", "cache"} and min(awake.values()) >= SIZE
    addresses = regions.weights.data_ptr(), regions.cache.data_ptr()
    memory.sleep(discard=["cache"])
    assert device() == {"weights": 0, "cache": 0}
    asleep = memory.status()
    assert asleep["weights"]["offloaded"] == asleep["weights"]["host"] == awake["weights"]
    assert asleep["cache"]["discarded"] == awake["cache"] and asleep["cache"]["host"] == 0
    memory.wake("weights")
    assert device() == {"weights": awake["weights"], "cache": 0}
    assert regions.intact()
    memory.wake()
    assert device() == awake
    assert (regions.weights.data_ptr(), regions.cache.data_ptr()) == addresses
    memory.sleep("cache")
    assert device() == {"weights": awake["weights"], "cache": 0}
    memory.sleep("cache")  # asleep already


def test_a_tag_that_no_region_has_is_named_before_anything_is_touched(regions: Regions) -> None:
    awake = device()
    for call in (
        lambda: memory.sleep("wieghts"),
        lambda: memory.sleep("weights", discard=["wieghts"]),
        lambda: memory.wake("wieghts"),
    ):
        with pytest.raises(ValueError, match=r"tag 'wieghts'; regions: cache, weights$"):
            call()
    assert device() == awake


def test_without_a_region_there_is_nothing_to_do() -> None:
    torch.npu.set_device(0)
    assert memory.status() == {}
    memory.sleep()
    memory.wake()
    with pytest.raises(ValueError, match=r"none yet: allocate inside memory\.region\(tag\)"):
        memory.sleep("weights")


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_in_the_process_and_the_program_leave_each_other_alone(
    regions: Regions, level: int
) -> None:
    """Even with the same tag."""
    engine, weights = CamemBackend(), Block("weights", SIZE)
    awake = device()
    try:
        engine.suspend(level)
        assert (engine.state(), weights.state) == (
            "SUSPENDED",
            "offloaded" if level == 1 else "discarded",
        )
        assert device() == awake and regions.intact()
        memory.sleep()
        engine.resume()
        assert (engine.state(), weights.state) == ("RUNNING", "mapped")
        assert device() == {"weights": 0, "cache": 0}
        if level == 1:
            assert weights.intact()
        memory.wake()
        assert device() == awake
        engine.discard(("kv_cache",))
        assert device() == awake
    finally:
        weights.free()


def test_a_wake_that_fails_leaves_all_asleep_and_can_be_repeated(regions: Regions) -> None:
    from vllm_sleep_ascend.sim import control

    awake = device()
    memory.sleep()
    control.set_faults("aclrtMapMem:2:507899")
    with pytest.raises(RuntimeError, match="aclrtMapMem failed with 507899"):
        memory.wake()
    control.set_faults("")
    assert device() == {"weights": 0, "cache": 0}
    memory.wake()
    assert device() == awake


def test_the_example_trains_on_as_if_it_had_not_slept_and_imports_no_vllm() -> None:
    program = (
        "import sys\n"
        "sys.modules['vllm'] = None  # whoever imports it fails\n"
        "import sleeping_trainer\n"
        "sleeping_trainer.main()\n"
    )
    done = programs.run(
        [*LAUNCHER, sys.executable, "-c", program],
        200,
        env={
            **os.environ,
            **USUAL_MACHINE,
            "PYTHONPATH": f"{ROOT / 'examples'}:{os.environ['PYTHONPATH']}",
        },
    )
    assert done.returncode == 0, done.stderr
    awake, asleep, again, losses = done.stdout.splitlines()
    mib = [int(re.search(r"(\d+) MiB in regions", line)[1]) for line in (awake, asleep, again)]
    assert mib[0] == mib[2] > 16 and mib[1] == 0
    assert losses == "the same losses"


def test_nothing_of_a_region_is_left_in_the_allocator(regions: Regions) -> None:
    assert {a["tag"] for a in _camem.allocations()} >= {"program:weights", "program:cache"}
    assert "program:weights" not in CamemBackend().tags()
