# SPDX-License-Identifier: Apache-2.0
"""Graphs that use sleeping memory: they hold addresses, and a wake restores the same addresses."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import ROOT, programs
from helpers.allocator import configure
from helpers.machine import LAUNCHER, USUAL_MACHINE

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.memory import pool
from vllm_sleep_ascend.sim import control

TAGS = ["weights", "cudagraph"]
LEVEL_1 = dict.fromkeys(TAGS, "offload")
SIZE = 512


class Captured:
    """A graph whose weights, input and private memory are in our pools."""

    def __init__(self) -> None:
        with pool.use_pool("weights"):
            self.weight = torch.empty(SIZE, SIZE, device="npu")
        self.weight.copy_(torch.randn(SIZE, SIZE) / SIZE**0.5)
        _camem.set_current_tag("cudagraph")
        self.pool = torch.npu.MemPool(pool._allocator()._allocator)
        with torch.npu.use_mem_pool(self.pool):
            self.x = torch.empty(8, SIZE, device="npu")
        self.graph = torch.npu.NPUGraph()
        with torch.no_grad(), torch.npu.graph(self.graph, pool=self.pool.id):
            self.y = (self.x @ self.weight).relu() @ self.weight
        _camem.set_current_tag("")

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.y.cpu()

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        return ((x.npu() @ self.weight).relu() @ self.weight).cpu()


@pytest.fixture
def captured() -> Iterator[Captured]:
    torch.npu.init()
    torch.npu.empty_cache()
    configure()
    before = control.counters().device_bytes
    held = Captured()
    yield held
    held.graph.reset()
    del held.weight, held.x, held.y, held.graph, held.pool
    gc.collect()
    pool.release_pools()
    torch.npu.empty_cache()
    assert _camem.allocations() == []
    assert control.counters().device_bytes <= before


def test_a_graph_gives_the_same_after_each_sleep(captured: Captured) -> None:
    tags = {allocation["tag"] for allocation in _camem.allocations()}
    assert tags == set(TAGS), "weights and what the graph took while it was captured"
    captures = control.call_count("aclmdlRICaptureBegin")
    for seed in range(3):
        x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(seed))
        expected = captured.replay(x)
        assert torch.equal(expected, captured.eager(x))
        _camem.sleep(LEVEL_1)
        assert sum(allocation["device_bytes"] for allocation in _camem.allocations()) == 0
        _camem.wake(TAGS)
        assert torch.equal(captured.replay(x), expected)
    assert control.call_count("aclmdlRICaptureBegin") == captures


def test_a_graph_sees_new_weights_after_level_2(captured: Captured) -> None:
    x = torch.randn(8, SIZE)
    before = captured.replay(x)
    _camem.sleep({"weights": "discard", "cudagraph": "offload"})
    _camem.wake(TAGS)
    captured.weight.copy_(torch.randn(SIZE, SIZE) / SIZE**0.5)
    after = captured.replay(x)
    assert torch.equal(after, captured.eager(x))
    assert not torch.equal(after, before)


def test_a_sleep_during_a_replay_waits_for_it(captured: Captured) -> None:
    """The simulator aborts the process if memory is taken away from a running graph."""
    x = torch.randn(8, SIZE)
    expected = captured.replay(x)
    for _ in range(20):
        captured.graph.replay()
    _camem.sleep(LEVEL_1)
    _camem.wake(TAGS)
    assert torch.equal(captured.replay(x), expected)


def test_a_sleep_during_a_capture_is_refused_and_the_capture_goes_on(captured: Captured) -> None:
    x = torch.randn(8, SIZE)
    expected = captured.replay(x)
    second = torch.npu.NPUGraph()
    with torch.no_grad(), torch.npu.graph(second):
        y = captured.y * 2
        with pytest.raises(RuntimeError, match="captur"):
            _camem.sleep(LEVEL_1)
        z = y + 1
    captured.replay(x)
    second.replay()
    assert torch.equal(z.cpu(), expected * 2 + 1)
    second.reset()


def test_executing_a_graph_over_memory_that_sleeps_is_a_fault() -> None:
    result = programs.run(
        [
            *LAUNCHER,
            sys.executable,
            "-c",
            "import torch\n"
            "from allocator.test_graphs import LEVEL_1, Captured, _camem, configure\n"
            "torch.npu.init()\n"
            "configure()\n"
            "captured = Captured()\n"
            "_camem.sleep(LEVEL_1)\n"
            "print('asleep', flush=True)\n"
            "captured.graph.replay()\n"
            "torch.npu.synchronize()\n",
        ],
        120,
        cwd=ROOT / "tests",
        env={**os.environ, **USUAL_MACHINE},
    )
    assert result.stdout == "asleep\n", result.stderr
    assert result.returncode != 0
    assert "is no mapped device memory any more" in result.stderr
