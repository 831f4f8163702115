# SPDX-License-Identifier: Apache-2.0
"""Graphs through the unmodified torch_npu."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch_npu
from helpers.ascendcl import MIB, run_python
from torch import nn

from vllm_sleep_ascend.sim import control

FRACTAL_NZ = 29


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """torch keeps streams and events, so their numbers are not compared."""
    torch.npu.set_device(0)
    yield
    torch.npu.synchronize()
    torch.npu.empty_cache()


@contextmanager
def graph(**options) -> Iterator[torch.npu.NPUGraph]:
    """Capture the block without gradients."""
    captured = torch.npu.NPUGraph()
    with torch.no_grad(), torch.npu.graph(captured, **options):
        yield captured


def replay(captured: torch.npu.NPUGraph) -> None:
    captured.replay()
    torch.npu.synchronize()


def is_any(tensor: torch.Tensor) -> bool:
    """Whether nothing has been written to it yet."""
    return bool(tensor.isnan().all())


OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "elementwise": lambda x, y: (x * y + 3).relu() - y.exp() / 2,
    "product": lambda x, y: torch.addmm(x[0], x, y.T) @ y,
    "batched": lambda x, y: torch.bmm(x.view(2, 4, 8), y.view(2, 8, 4)).flatten(),
    "reductions": lambda x, y: torch.stack([x.sum(0), y.mean(0), x.amax(0), y.softmax(-1)[0]]),
    "views": lambda x, y: x.view(4, 16)[1:, ::2].T.contiguous() + y.flatten()[:1],
    "indices": lambda x, y: x[y[0].argsort()[:2]] + y.index_select(0, x[0].argsort()[:2]),
    "in place": lambda x, y: torch.zeros_like(x).add_(y).mul_(2)[2:5].copy_(x[:3]),
    "out": lambda x, y: torch.add(x, y, out=torch.empty(0, device="npu")),
    "several": lambda x, y: torch.cat([*x.topk(3)[:1], *y.sort(-1)[:1]], 1),
    "types": lambda x, y: (x.half() @ y.half().T).float() + (y > 0).int(),
    "where": lambda x, y: torch.where(x > y, x, 0.5),
    "factory": lambda x, y: torch.arange(8, device="npu") + torch.full((8, 8), 2.5, device="npu"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_give_the_same_in_a_graph(name: str) -> None:
    operator = OPERATORS[name]
    x, y = (torch.randn(8, 8, device="npu") for _ in range(2))
    with graph() as captured:
        result = operator(x, y)
    for _ in range(2):
        for tensor in (x, y):
            tensor.copy_(torch.randn(8, 8))
        replay(captured)
        expected = operator(x, y)
        assert result.dtype == expected.dtype
        assert result.stride() == expected.stride()
        assert torch.equal(result, expected)


def test_nothing_is_computed_while_it_is_captured() -> None:
    x = torch.ones(4, device="npu")
    with graph() as captured:
        y = x + 1
        x.add_(1)
    assert is_any(y)
    assert x.tolist() == [1.0] * 4
    replay(captured)
    assert y.tolist() == x.tolist() == [2.0] * 4


def test_a_graph_reads_what_lies_at_its_addresses() -> None:
    x, one = torch.ones(4, device="npu"), torch.tensor(1.0)
    with graph() as captured:
        y = x + one  # a host scalar is an argument, which the graph keeps
    one.fill_(100)
    x.fill_(5)
    captured.replay()
    captured.replay()
    assert y.tolist() == [6.0] * 4


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(4).npu(),
        lambda x: x[torch.tensor([1, 2])],
        lambda x: torch.npu.synchronize(),
        lambda x: x.unique(),
    ],
    ids=["item", "nonzero", "mask", "cpu", "npu", "index", "synchronize", "unique"],
)
def test_what_waits_for_the_device_cannot_be_captured(operation: Callable) -> None:
    x = torch.ones(4, device="npu")
    captured = torch.npu.NPUGraph()
    queue = torch.npu.Stream()
    with torch.npu.stream(queue):
        captured.capture_begin()
        with pytest.raises(RuntimeError):
            operation(x)
        try:
            captured.capture_end()
        except RuntimeError as error:
            assert "507903" in str(error), "what it refused may have spoiled it"
    assert x.sum().item() == 4, "outside it goes on"


def test_page_locked_memory_is_copied_in_a_graph() -> None:
    given = torch.arange(4.0).pin_memory()
    got = torch.empty(4, dtype=torch.float16).pin_memory()
    x = torch.zeros(4, device="npu")
    with graph() as captured:
        x.copy_(given, non_blocking=True)
        x.mul_(2)
        got.copy_(x, non_blocking=True)  # converted on the device
    for _ in range(2):
        given.add_(1)
        replay(captured)
        assert got.tolist() == (given * 2).tolist()


def test_random_numbers_are_those_without_a_graph() -> None:
    with graph() as captured:
        x = torch.empty(16, device="npu").exponential_()
        y = torch.rand(16, device="npu")
    torch.npu.manual_seed(7)
    seen = []
    for _ in range(2):
        captured.replay()
        seen.append((x.cpu(), y.cpu()))
    torch.npu.manual_seed(7)
    for first, second in seen:
        assert torch.equal(torch.empty(16, device="npu").exponential_().cpu(), first)
        assert torch.equal(torch.rand(16, device="npu").cpu(), second)


def test_a_module_and_its_gradients() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to("npu")
    plain = copy.deepcopy(module)
    sample = torch.randn(3, 8, device="npu", requires_grad=True)
    graphed = torch.npu.make_graphed_callables(module, (sample,))
    for _ in range(2):
        x = torch.randn(3, 8, device="npu", requires_grad=True)
        same = x.detach().clone().requires_grad_()
        results = []
        for model, given in ((graphed, x), (plain, same)):
            model.zero_grad()
            results.append(model(given))
            results[-1].square().sum().backward()
        assert torch.equal(*results)
        assert torch.equal(x.grad, same.grad)
        for ours, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_graphs_share_a_pool_and_give_it_back() -> None:
    torch.npu.empty_cache()
    before = control.counters().device_bytes
    pool = torch.npu.graph_pool_handle()
    x = torch.ones(4 * MIB, device="npu")
    with graph(pool=pool) as first:
        y = x * 2 + 1
    with_one = control.counters().device_bytes
    with graph(pool=pool) as second:
        z = y * 3
    assert first.pool() == second.pool()
    assert control.counters().device_bytes - with_one <= 18 * MIB, "it is shared"
    first.replay()
    second.replay()
    assert z[0].item() == 9
    torch.npu.empty_cache()
    assert control.counters().device_bytes - before >= 32 * MIB, "a graph's memory is kept"
    first.reset()
    second.reset()
    del first, second, x, y, z
    torch.npu.synchronize()
    torch.npu.empty_cache()
    assert control.counters().device_bytes == before


def test_streams_join_a_capture() -> None:
    x = torch.ones(8, device="npu")
    side = torch.npu.Stream()
    with graph() as captured:
        main = torch.npu.current_stream()
        y = x + 1
        side.wait_stream(main)
        with torch.npu.stream(side):
            assert torch.npu.is_current_stream_capturing()
            z = y * 2
        main.wait_stream(side)
        total = y + z
    x.fill_(2)
    replay(captured)
    assert total.tolist() == [9.0] * 8


def test_kernels_are_exchanged_behind_an_external_event() -> None:
    """As attention passes each step's lengths to a graph. torch_npu keeps the event's memory."""
    result = run_python(
        "import torch, torch_npu\n"
        "x, y = torch.ones(4, device='npu'), torch.empty(4, device='npu')\n"
        "main, update = torch.npu.Stream(), torch.npu.Stream()\n"
        "gate, graph = torch.npu.ExternalEvent(), torch.npu.NPUGraph()\n"
        "with torch.npu.stream(main):\n"
        "    torch.npu.synchronize()\n"
        "    graph.capture_begin()\n"
        "    gate.wait(main)\n"
        "    gate.reset(main)\n"
        "    torch.npu.graph_task_group_begin(main)\n"
        "    torch.add(x, 1, out=y)\n"
        "    group = torch.npu.graph_task_group_end(main)\n"
        "    z = y * 10\n"
        "    graph.capture_end()\n"
        "for number in (5, 7):\n"
        "    with torch.npu.stream(main):\n"
        "        graph.replay()\n"
        "    assert not main.query(), 'it waits for the event'\n"
        "    with torch.npu.stream(update):\n"
        "        torch.npu.graph_task_update_begin(update, group)\n"
        "        torch.add(x, number, out=y)\n"
        "        torch.npu.graph_task_update_end(update)\n"
        "        gate.record(update)\n"
        "    torch.npu.synchronize()\n"
        "    assert z.tolist() == [(1.0 + number) * 10] * 4\n",
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_tensors_in_tiles_in_a_graph() -> None:
    """Their casts are another kind of operator, which torch_npu does not allow in a capture."""
    x = torch.randn(4, 32, dtype=torch.float16, device="npu")
    weight = torch.randn(64, 32, dtype=torch.float16, device="npu")
    tiled = torch_npu.npu_format_cast(weight.clone(), FRACTAL_NZ)
    with graph() as captured:
        product = x @ tiled.T
        doubled = tiled.mul_(2)
    assert torch.equal(torch_npu.npu_format_cast(tiled, 2), weight), "nothing is done yet"
    replay(captured)
    assert torch.equal(product, x @ weight.T)
    assert torch.equal(torch_npu.npu_format_cast(doubled, 2), weight * 2)
    replay(captured)
    assert torch.equal(product, x @ (weight * 2).T)


def test_operators_of_torch_npu_in_a_graph() -> None:
    x = torch.randn(4, 16, dtype=torch.float16, device="npu")
    gamma = torch.ones(16, dtype=torch.float16, device="npu")
    with graph() as captured:
        normed, _ = torch_npu.npu_rms_norm(x, gamma, 1e-6)
        activated = torch_npu.npu_swiglu(normed)
    for _ in range(2):
        x.copy_(torch.randn(4, 16))
        replay(captured)
        assert torch.equal(normed, torch_npu.npu_rms_norm(x, gamma, 1e-6)[0])
        assert torch.equal(activated, torch_npu.npu_swiglu(normed))


@pytest.mark.parametrize(
    "ending",
    [
        "torch.npu.empty_cache()",
        "graph.reset()",
        "torch.npu.current_stream().synchronize()",
        "",
    ],
)
def test_kernels_in_python_run_while_somebody_waits(ending: str) -> None:
    """On hardware no kernel needs the GIL, and torch_npu holds it in some waits."""
    result = run_python(
        "import torch, torch_npu\n"
        "x, gamma = torch.randn(64, 64, device='npu'), torch.ones(64, device='npu')\n"
        "graph = torch.npu.NPUGraph()\n"
        "with torch.npu.graph(graph):\n"
        "    y = x\n"
        "    for _ in range(50):\n"
        "        y, _ = torch_npu.npu_rms_norm(y @ x, gamma, 1e-6)\n"
        "for _ in range(20):\n"
        "    graph.replay()\n" + ending,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_other_devices_wait_for_what_they_copy() -> None:
    x = torch.ones(256, 256, device="npu:0")
    with graph() as captured:
        y = x
        for _ in range(40):
            y = (y @ x) / 256
    captured.replay()
    assert torch.equal(y.to("npu:1").cpu(), torch.ones(256, 256))


def test_a_kernel_that_fails_in_a_graph_fails_its_context() -> None:
    result = run_python(
        "import torch, torch_npu\n"
        "x, index = torch.ones(4, device='npu'), torch.zeros(1, dtype=torch.long, device='npu')\n"
        "graph = torch.npu.NPUGraph()\n"
        "with torch.npu.graph(graph):\n"
        "    y = x.index_select(0, index)\n"
        "index.fill_(9)\n"
        "graph.replay()\n"
        "try:\n"
        "    torch.npu.synchronize()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "print('query:', call('aclrtStreamQuery', None, byref(c_int32())))\n"
        "os._exit(0)\n",
        timeout=120,
    )
    assert "507011" in result.stdout, result
    assert "index out of range" in result.stdout
    assert "query: 507011" in result.stdout, "nor is it idle for who only asks"
