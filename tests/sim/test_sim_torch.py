# SPDX-License-Identifier: Apache-2.0
"""The real torch_npu on the simulated device."""

import copy
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.ascendcl import GIB, MIB

from vllm_sleep_ascend.sim import control


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """torch keeps streams and events, so their numbers are not compared."""
    torch.npu.set_device(0)
    torch.npu.empty_cache()
    yield
    torch.npu.synchronize()
    torch.npu.empty_cache()


def test_the_device() -> None:
    assert torch.npu.is_available()
    assert torch.npu.device_count() == torch.accelerator.device_count() == 2
    assert torch.npu.get_device_name().startswith("Ascend910B")
    assert torch.npu.get_device_properties(0).total_memory == GIB
    assert torch.npu.mem_get_info()[1] == GIB
    assert str(torch.accelerator.current_accelerator()) == "npu"


def test_the_allocator() -> None:
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() >= 64 * MIB
    assert torch.npu.mem_get_info()[0] <= GIB - 64 * MIB
    del x
    assert torch.npu.mem_get_info()[0] <= GIB - 64 * MIB, "cached"
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] > GIB - 64 * MIB
    assert torch.npu.memory_stats()["allocated_bytes.all.peak"] >= 64 * MIB


def test_new_tensors_are_not_zero() -> None:
    torch.npu.empty_cache()
    assert torch.empty(MIB, device="npu").isnan().all()
    assert torch.empty(MIB, dtype=torch.bfloat16, device="npu").isnan().all()


def test_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * GIB, dtype=torch.uint8, device="npu")
    half = torch.empty(GIB // 2, dtype=torch.uint8, device="npu")
    del half
    torch.empty(GIB - 32 * MIB, dtype=torch.uint8, device="npu")  # frees what was cached


def test_pools() -> None:
    pool = torch.npu.MemPool()
    with torch.npu.use_mem_pool(pool):
        x = torch.ones(MIB, device="npu")
    y = torch.ones(MIB, device="npu")
    assert torch.equal(x, y)
    del x, y, pool


def test_streams_and_events() -> None:
    stream = torch.npu.Stream()
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    source = torch.randn(MIB).pin_memory()
    back = torch.empty(MIB).pin_memory()
    start.record()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        stream.wait_stream(torch.npu.default_stream())
        there = source.to("npu", non_blocking=True)
        doubled = there * 2
        back.copy_(doubled, non_blocking=True)
        end.record()
    there.record_stream(stream)
    torch.npu.current_stream().wait_stream(stream)
    torch.npu.synchronize()
    assert end.query() and stream.query()
    assert torch.equal(back, source * 2)
    assert start.elapsed_time(end) >= 0


def test_operators_are_ordered_with_copies() -> None:
    sources = [torch.full((MIB,), float(i)).pin_memory() for i in range(10)]
    x = torch.empty(MIB, device="npu")
    total = torch.zeros((), device="npu")
    for source in sources:
        x.copy_(source, non_blocking=True)
        total += x[-1]
    assert total.item() == 45


def test_pinned_memory() -> None:
    x = torch.ones(1000).pin_memory()
    assert x.is_pinned()
    assert torch.empty(5, pin_memory=True).is_pinned()
    assert control.counters().pinned_bytes > 0
    assert not x.npu().cpu().is_pinned()


def test_formats_and_casts() -> None:
    import torch_npu

    x = torch.randn(4, 6, device="npu")
    assert int(torch_npu.get_npu_format(x)) == 2
    assert torch.equal(torch_npu.npu_format_cast(x, 2), x)
    assert torch_npu.npu_dtype_cast(x, torch.float16).dtype == torch.float16


def test_saving_and_copying() -> None:
    x = torch.randn(4, 6, device="npu")
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), x)
    assert torch.equal(copy.deepcopy(x), x)
    assert "npu:0" in repr(x)
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 16)
        self.qkv = torch.nn.Linear(16, 48, bias=False)
        self.norm = torch.nn.LayerNorm(16)
        self.out = torch.nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm(x + F.gelu(attended.transpose(1, 2).flatten(2)))
        return self.out(F.softmax(x, -1) * x)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    on_cpu = Block()
    on_device = copy.deepcopy(on_cpu).npu()
    tokens = torch.randint(0, 32, (3, 10))
    losses = []
    for model, inputs in ((on_cpu, tokens), (on_device, tokens.npu())):
        steps = optimizer(model.parameters(), lr=0.05)  # type: ignore[call-arg]
        for _ in range(5):
            steps.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for ours, theirs in zip(on_device.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-5)


def test_autocast() -> None:
    x = torch.ones(4, 4, device="npu")
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


def test_all_cores_serve_operators_at_one_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(512, 512, device="npu")
        assert torch.isfinite(x @ x).all()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_small_operators_have_little_overhead() -> None:
    x = torch.ones(16, device="npu")

    def seconds_each() -> float:
        started = time.perf_counter()
        for _ in range(500):
            x + x
        return (time.perf_counter() - started) / 500

    assert any(seconds_each() < 50e-6 for _ in range(200))  # a busy machine holds most of them up


HCCL = """
import torch, torch.distributed as dist
torch.npu.set_device(0)
free = torch.npu.mem_get_info()[0]
dist.init_process_group("hccl", init_method="tcp://127.0.0.1:0", world_size=1, rank=0)
x = torch.arange(5.0, device="npu")
dist.all_reduce(x)
dist.barrier()
assert x.tolist() == [0, 1, 2, 3, 4]
out = torch.empty(5, device="npu")
dist.all_gather_into_tensor(out, x)
assert torch.equal(out, x)
parts = [torch.empty(5, device="npu")]
dist.all_gather(parts, x * 2)
assert torch.equal(parts[0], x * 2)
dist.reduce_scatter_tensor(out, x * 3)
assert torch.equal(out, x * 3)
dist.all_to_all_single(out, x * 4)
assert torch.equal(out, x * 4)
dist.broadcast(x, 0)
objects = [None]
dist.all_gather_object(objects, {"a": 1})
assert objects == [{"a": 1}]
dist.all_reduce(x, async_op=True).wait()
torch.npu.synchronize()
held = free - torch.npu.mem_get_info()[0] - torch.npu.memory_reserved()
assert held == 2 * (4 << 20), held
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("ending", ["dist.destroy_process_group()", ""])
def test_communication_of_one_rank(ending: str) -> None:
    result = run(HCCL + ending, NPU_SIM_HCCL_BUFFER_MIB="4")
    assert result.returncode == 0, result.stderr


def test_destroying_a_group_gives_its_buffers_back() -> None:
    code = HCCL + (
        "dist.destroy_process_group()\n"
        "assert torch.npu.mem_get_info()[0] == free - torch.npu.memory_reserved()\n"
    )
    result = run(code, NPU_SIM_HCCL_BUFFER_MIB="4")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "x = torch.ones(5, device='npu')",
        "x = torch.ones(8 << 20, device='npu'); y = torch.empty(8 << 20).pin_memory()\n"
        "for _ in range(20): y.copy_(x, non_blocking=True)",
        "pool = torch.npu.MemPool()\n"
        "with torch.npu.use_mem_pool(pool): x = torch.ones(5, device='npu')",
    ],
    ids=["a tensor", "copies in flight", "a pool"],
)
def test_exit_is_clean(code: str) -> None:
    result = run("import torch\ntorch.npu.set_device(0)\n" + code)
    assert result.returncode == 0, result.stderr
    # torch_npu's line of level I on its queue comes when the queue's thread is late.
    expected = re.compile(r"I\d{4} .*torch_npu|.*32 padding size")
    assert [line for line in result.stderr.splitlines() if not expected.match(line)] == []
    assert result.stdout == ""


def test_an_error_of_the_runtime_reaches_the_caller() -> None:
    control.set_faults("aclrtMemcpy:1:507899")
    x = torch.ones(5)
    with pytest.raises(RuntimeError, match="507899"):
        x.npu()
    assert torch.equal(x.npu().cpu(), x), "and the next call works"
