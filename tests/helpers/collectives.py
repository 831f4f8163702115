# SPDX-License-Identifier: Apache-2.0
"""A rank that runs checks of this file by name, for tests of communication.

collectives.py CHECK[,CHECK…] STORE WORLD RANK [DEVICE]
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from helpers.patience import wait_for

TYPES = {
    torch.int8: (1, 3),
    torch.int16: (-100, 100),
    torch.int32: (-1000, 1000),
    torch.int64: (-(1 << 40), 1 << 40),
    torch.float16: (-2, 2),
    torch.float32: (-10, 10),
    torch.bfloat16: (-2, 2),
}
OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
SIZES = (1, 7, 5000, 100_003)
"""Elements: fewer than ranks, odd, and enough to be reduced in slices."""


def values(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """That rank's values, on the host."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    low, high = TYPES.get(dtype, (0, 100))
    if dtype.is_floating_point:
        return (torch.rand(count, generator=generator) * (high - low) + low).to(dtype)
    return torch.randint(low, high, (count,), generator=generator).to(dtype)


def equal(got: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    expected = expected.to(got.dtype)
    if got.dtype.is_floating_point:
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[got.dtype]
        torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=1e-4, msg=where)
    else:
        assert torch.equal(got.cpu(), expected), (where, got[:8], expected[:8])


class Rank:
    def __init__(self, store: str, world: int, rank: int, device: int) -> None:
        torch.npu.set_device(device)
        self.world, self.rank = world, rank
        dist.init_process_group(
            "hccl",
            init_method=f"file://{store}",
            world_size=world,
            rank=rank,
            timeout=timedelta(seconds=60),
        )
        self.gloo = dist.new_group(backend="gloo")

    def results_equal_gloo(self) -> None:
        """Every collective with every type of HCCL, compared with gloo or plain arithmetic."""
        world, rank = self.world, self.rank
        for dtype in TYPES:
            for name, operation in OPERATIONS.items():
                if name == "prod" and dtype in (torch.int16, torch.bfloat16):
                    continue
                for count in SIZES:
                    self.check_reductions(dtype, name, operation, count)
        for dtype in (torch.uint8, torch.bool, torch.float64, torch.float32, torch.bfloat16):
            own, others = values(rank, 30, dtype), [values(r, 30, dtype) for r in range(world)]
            gathered = torch.empty(world * 30, dtype=dtype, device="npu")
            dist.all_gather_into_tensor(gathered, own.npu())
            equal_bits(gathered, torch.cat(others))
            for root in range(world):
                sent = own.npu()
                dist.broadcast(sent, root)
                equal_bits(sent, others[root])
            parts = [torch.empty(30, dtype=dtype, device="npu") for _ in range(world)]
            dist.all_gather(parts, own.npu())
            for part, expected in zip(parts, others, strict=True):
                equal_bits(part, expected)
        self.check_uneven()
        self.check_point_to_point()
        dist.barrier()

    def check_reductions(
        self, dtype: torch.dtype, name: str, operation: dist.ReduceOp, count: int
    ) -> None:
        world, rank, where = self.world, self.rank, f"{dtype} {name} {count}"
        own = values(rank, count, dtype)
        wide = torch.float32 if dtype.is_floating_point else torch.int64  # gloo lacks int16
        expected = own.to(wide).clone()
        dist.all_reduce(expected, operation, group=self.gloo)
        got = own.npu()
        dist.all_reduce(got, operation)
        equal(got, expected, where)
        raw = got.cpu().view(torch.uint8)
        bits = [torch.empty_like(raw) for _ in range(world)]
        dist.all_gather(bits, raw, group=self.gloo)
        assert all(torch.equal(bits[0], other) for other in bits), f"{where}: ranks differ"
        got = own.npu()
        dist.reduce(got, world - 1, operation)
        equal(got, expected if rank == world - 1 else own, where)
        own = values(rank, count * world, dtype, seed=1)
        expected = own.to(wide).clone()
        dist.all_reduce(expected, operation, group=self.gloo)
        part = torch.empty(count, dtype=dtype, device="npu")
        dist.reduce_scatter_tensor(part, own.npu(), operation)
        equal(part, expected[rank * count : (rank + 1) * count], where)

    def check_uneven(self) -> None:
        world, rank = self.world, self.rank
        counts = [3 + r for r in range(world)]
        parts = [torch.empty(n, device="npu") for n in counts]
        own = values(rank, counts[rank], torch.float32)
        dist.all_gather(parts, own.npu())
        for r, part in enumerate(parts):
            equal_bits(part, values(r, counts[r], torch.float32))
        inputs = [values(rank, n, torch.float32, seed=r) for r, n in enumerate(counts)]
        part = torch.empty(counts[rank], device="npu")
        dist.reduce_scatter(part, [one.npu() for one in inputs])
        expected = sum(values(r, counts[rank], torch.float32, seed=rank) for r in range(world))
        equal(part, expected, "uneven reduce-scatter")
        # Rank r sends r + s elements to rank s.
        sizes = [rank + s for s in range(world)]
        sent = torch.cat([torch.full((n,), 10.0 * rank + s) for s, n in enumerate(sizes)])
        got = torch.empty(sum(sizes), device="npu")
        dist.all_to_all_single(got, sent.npu(), sizes, sizes)
        expected = torch.cat([torch.full((n,), 10.0 * s + rank) for s, n in enumerate(sizes)])
        equal_bits(got, expected)
        got = torch.empty(world, device="npu")
        dist.all_to_all_single(got, (torch.arange(world) + 10.0 * rank).npu())
        equal_bits(got, 10.0 * torch.arange(world) + rank)
        chunks = [torch.full((4,), float(r)).npu() for r in range(world)] if rank == 0 else None
        got = torch.empty(4, device="npu")
        dist.scatter(got, chunks, 0)
        equal_bits(got, torch.full((4,), float(rank)))

    def check_point_to_point(self) -> None:
        world, rank = self.world, self.rank
        after, before = (rank + 1) % world, (rank - 1) % world
        large = 300_000  # more than a socket buffers
        got = torch.empty(large, device="npu")
        if rank % 2 == 0:
            dist.send(values(rank, large, torch.float32).npu(), after)
            dist.recv(got, before)
        else:
            dist.recv(got, before)
            dist.send(values(rank, large, torch.float32).npu(), after)
        equal_bits(got, values(before, large, torch.float32))
        got.zero_()
        sent = values(rank, large, torch.float32, seed=5).npu()
        work = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, got, before)]
        )
        for one in work:
            one.wait()
        equal_bits(got, values(before, large, torch.float32, seed=5))

    def streams_order_the_work(self) -> None:
        """Two streams and 200 dependent steps: each sees what the previous one wrote."""
        x = torch.ones(1000, device="npu")
        side = torch.npu.Stream()
        for _ in range(100):
            dist.all_reduce(x)
            x /= self.world
            side.wait_stream(torch.npu.current_stream())
            with torch.npu.stream(side):
                dist.all_reduce(x, dist.ReduceOp.MAX)
                x += 1
            torch.npu.current_stream().wait_stream(side)
        assert torch.equal(x.cpu(), torch.full((1000,), 101.0)), x[:4]

    def in_a_graph(self) -> None:
        """A graph with collectives between products gives the eager result each time."""
        weight = values(self.rank, 64 * 64, torch.float32).view(64, 64).npu()
        x = torch.empty(4, 64, device="npu")

        def step() -> torch.Tensor:
            y = x @ weight
            dist.all_reduce(y)
            parts = [torch.empty_like(y) for _ in range(self.world)]
            dist.all_gather(parts, y * (self.rank + 1))
            return torch.stack(parts).sum(0)

        x.fill_(0)
        step()
        torch.npu.synchronize()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            result = step()
        for seed in range(3):
            x.copy_(values(self.rank, 4 * 64, torch.float32, seed).view(4, 64))
            graph.replay()
            captured = result.clone()
            assert torch.equal(captured, step()), seed

    def in_a_graph_that_is_refused(self) -> None:
        """A graph on two streams at once fails on the second one; the group survives."""
        x, begun = torch.ones(4, device="npu"), torch.zeros(4).pin_memory()
        dist.all_reduce(x)
        gate, graph = torch.npu.ExternalEvent(), torch.npu.NPUGraph()
        first, second = torch.npu.Stream(), torch.npu.Stream()
        with torch.npu.stream(first):
            torch.npu.synchronize()
            graph.capture_begin()
            begun.copy_(x, non_blocking=True)
            gate.wait(first)
            gate.reset(first)
            dist.all_reduce(x)
            graph.capture_end()
            graph.replay()
        wait_for(begun.any, "the first stream to execute the graph")
        with torch.npu.stream(second):
            graph.replay()
            try:
                second.synchronize()
            except RuntimeError as error:
                assert "507001" in str(error), error
            else:
                raise AssertionError("both ran")
        with torch.npu.stream(second):
            gate.record(second)
        first.synchronize()
        y = torch.ones(4, device="npu")
        dist.all_reduce(y)
        assert y.tolist() == [float(self.world)] * 4

    def in_a_graph_of_a_destroyed_group(self) -> None:
        x = torch.ones(4, device="npu")
        dist.all_reduce(x)
        torch.npu.synchronize()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            dist.all_reduce(x)
        dist.destroy_process_group()
        print("destroyed", flush=True)
        graph.replay()

    def groups_split(self) -> None:
        """Groups of half the ranks, with separate communicators."""
        world, rank = self.world, self.rank
        halves = [list(range(0, world, 2)), list(range(1, world, 2))]
        groups = [dist.new_group(half, backend="hccl") for half in halves]
        mine = rank % 2
        x = torch.full((10,), float(rank), device="npu")
        dist.all_reduce(x, group=groups[mine])
        assert torch.equal(x.cpu(), torch.full((10,), float(sum(halves[mine]))))
        dist.all_reduce(x)
        expected = float(len(halves[0]) * sum(halves[0]) + len(halves[1]) * sum(halves[1]))
        assert torch.equal(x.cpu(), torch.full((10,), expected))

    def sub_communicators(self) -> None:
        """HCCL's own calls: the odd ranks in reverse order, without the even ones."""
        hccl = ctypes.CDLL("libhccl.so")
        info = torch.zeros(4108, dtype=torch.uint8)
        if self.rank == 0:
            assert hccl.HcclGetRootInfo(ctypes.c_void_p(info.data_ptr())) == 0
        dist.broadcast(info, 0, group=self.gloo)
        whole, part = ctypes.c_void_p(), ctypes.c_void_p()
        arguments = (self.world, ctypes.c_void_p(info.data_ptr()), self.rank)
        assert hccl.HcclCommInitRootInfo(*arguments, ctypes.byref(whole)) == 0
        odd = list(range(1, self.world, 2))[::-1]
        x = torch.full((10,), float(self.rank), device="npu")
        torch.npu.synchronize()
        buffer, stream = ctypes.c_void_p(x.data_ptr()), None
        if self.rank in odd:
            ids = (ctypes.c_uint32 * len(odd))(*odd)
            place = odd.index(self.rank)
            new = (len(odd), ids, ctypes.c_uint64(7), place, None, ctypes.byref(part))
            assert hccl.HcclCreateSubCommConfig(ctypes.byref(whole), *new) == 0
            rank = ctypes.c_uint32()
            assert hccl.HcclGetRankId(part, ctypes.byref(rank)) == 0 and rank.value == place
            # Root 0 of the sub-communicator is the last odd rank.
            arguments = (buffer, ctypes.c_uint64(10), 4, 0, part, stream)
            assert hccl.HcclBroadcast(*arguments) == 0
        arguments = (buffer, buffer, ctypes.c_uint64(10), 4, 0, whole, stream)
        assert hccl.HcclAllReduce(*arguments) == 0
        torch.npu.synchronize()
        even = sum(range(0, self.world, 2))
        assert x.cpu().tolist() == [float(even + len(odd) * odd[0])] * 10
        if self.rank in odd:
            assert hccl.HcclCommDestroy(part) == 0
        assert hccl.HcclCommDestroy(whole) == 0

    def stages_share_a_communicator(self) -> None:
        """As in vLLM's pipeline, a stage receives after the previous one has announced it.

        Their communicator is released before the first message, and once more later.
        """
        from vllm_sleep_ascend.rank.communicators import Communicators, meet

        group = dist.new_group(backend="hccl")
        meet(group)
        communicators = Communicators(lambda: None, range(self.world))
        for _ in range(2):
            communicators.release()
            released = communicators.released
            dist.barrier(self.gloo)
            communicators.restore()
            communicators.forget()
            x = torch.full((4,), 0.0, device="npu")
            if self.rank > 0:
                dist.recv(torch.empty(1), self.rank - 1, group=self.gloo)
                dist.recv(x, self.rank - 1, group=group)
            if self.rank < self.world - 1:
                dist.send(torch.ones(1), self.rank + 1, group=self.gloo)
                dist.send(x + 1, self.rank + 1, group=group)
            equal_bits(x, torch.full((4,), float(self.rank)))
            assert released
        dist.barrier(self.gloo)

    def counts_differ(self) -> None:
        x = torch.ones(10 + self.rank, device="npu")
        fails(lambda: dist.all_reduce(x), "the ranks differ")

    def types_differ(self) -> None:
        x = torch.ones(8, dtype=(torch.float32, torch.int32)[self.rank % 2], device="npu")
        fails(lambda: dist.all_reduce(x), "the ranks differ")

    def calls_differ(self) -> None:
        x = torch.ones(8, device="npu")
        if self.rank == 0:
            fails(lambda: dist.all_reduce(x), "the ranks differ")
        else:
            fails(lambda: dist.broadcast(x, 0), "the ranks differ")

    def a_rank_dies(self) -> None:
        x = torch.ones(8, device="npu")
        dist.all_reduce(x)
        torch.npu.synchronize()
        if self.rank == self.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fails(lambda: dist.all_reduce(x), f"rank {self.world - 1} is gone")

    def buffers_are_device_memory(self) -> None:
        before = torch.npu.mem_get_info()[0] + torch.npu.memory_reserved()
        dist.all_reduce(torch.ones(1, device="npu"))
        torch.npu.synchronize()
        after = torch.npu.mem_get_info()[0] + torch.npu.memory_reserved()
        print("took", before - after)
        dist.destroy_process_group()
        assert torch.npu.mem_get_info()[0] + torch.npu.memory_reserved() == before


def equal_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.cpu(), expected), (got.dtype, got[:8], expected[:8])


def fails(operation, reason: str) -> None:
    try:
        operation()
        torch.npu.synchronize()
    except RuntimeError as error:
        assert reason in str(error) or "is gone" in str(error), error
        print("failed:", error)
    else:
        raise AssertionError("nothing failed")
    os._exit(0)  # a device with failed work cannot be shut down properly


def main() -> None:
    check, store, world, rank = sys.argv[1:5]
    device = int(sys.argv[5]) if len(sys.argv) > 5 else int(rank)
    this = Rank(store, int(world), int(rank), device)
    for name in check.split(","):
        getattr(this, name)()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
