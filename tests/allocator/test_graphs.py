# SPDX-License-Identifier: Apache-2.0
"""Graphs over memory that sleeps: they hold addresses, and memory comes back at its own."""

import torch
from helpers import MIB

from vllm_sleep_ascend import _camem, pool
from vllm_sleep_ascend.sim import control

LEVEL_1 = {"weights": "offload", "cudagraph": "offload", "kv_cache": "discard"}


def captured_over_our_memory() -> tuple[torch.npu.NPUGraph, torch.Tensor, torch.Tensor]:
    """A graph whose weights are ours and whose own memory is ours too; its input and output."""
    with pool.use_pool("weights"):
        weight = torch.empty(1024, 1024, device="npu")
    weight.copy_(torch.randn(1024, 1024))
    x = torch.randn(8, 1024, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.no_grad(), pool.use_pool("cudagraph"), torch.npu.graph(graph):
        y = (x @ weight).relu() @ weight
    return graph, x, y


def test_a_graph_gives_the_same_after_each_sleep() -> None:
    torch.npu.init()
    _camem.configure(chunk_bytes=4 * MIB, keep_host_backup=True, copy_threads=2, host_threads=2)
    graph, x, y = captured_over_our_memory()
    captures = control.call_count("aclmdlRICaptureBegin")
    graph.replay()
    expected = y.clone()
    for _ in range(3):
        _camem.sleep(LEVEL_1)
        assert not any(allocation.mapped for allocation in _camem.allocations())
        _camem.wake(["weights", "cudagraph", "kv_cache"])
        y.fill_(0)
        graph.replay()
        assert torch.equal(y, expected)
    assert control.call_count("aclmdlRICaptureBegin") == captures
