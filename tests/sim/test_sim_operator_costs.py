# SPDX-License-Identifier: Apache-2.0
"""The costs of operators: launches, use of the AI CPU, hidden copies, waits of the host."""

from collections.abc import Callable, Iterator
from ctypes import byref, c_void_p
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from helpers.ascendcl import call, ok

from vllm_sleep_ascend.sim import control
from vllm_sleep_ascend.sim.control import Costs

THREAD_LOCAL = 1
STREAM_CAPTURED = 107027
DRIVER_ERROR = 507899


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """torch keeps memory and streams, so their numbers are not compared."""
    torch.npu.set_device(0)
    yield
    control.set_faults("")
    torch.npu.synchronize()
    torch.npu.empty_cache()


def costs_of(operation: Callable[[], object]) -> Costs:
    torch.npu.synchronize()
    control.reset_counters()
    operation()
    return control.costs()


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape or (4, 6)).to(dtype).npu()


def test_launches_count_by_operator_and_in_all() -> None:
    x, w = tensor(torch.float32), tensor(torch.float32, 5, 6)

    def operation() -> None:
        F.linear(x, w)
        torch.mm(x, w.t(), out=x.new_empty(4, 5))
        x.add_(1).add_(x)
        torch.add(x, x, alpha=2)

    assert costs_of(operation) == Costs(5, 0, 0, 0)
    names = ("aten::mm", "aten::add_", "aten::add", "aten::linear", "aten::mul")
    assert [control.call_count(name) for name in names] == [2, 2, 1, 0, 0]
    control.reset_counters()
    assert control.costs() == Costs(0, 0, 0, 0)
    assert control.call_count("aten::mm") == 0


def test_views_metadata_and_memory_are_no_launches() -> None:
    x = tensor(torch.float32, 4, 6)

    def operation() -> None:
        views = [x.t(), x[1:, ::2], x.view(24), x.unsqueeze(0).squeeze(), x.expand(2, 4, 6)]
        views += [*x.split(2), *x.unbind(), x.permute(1, 0), x.diagonal(), x.unfold(1, 2, 2)]
        views += [
            x.detach(),
            x.select(0, 1),
            x.view(torch.int32),
            x.reshape(2, 12),
            x.narrow(0, 0, 2),
        ]
        views += [
            torch.empty_like(x),
            x.new_empty(3),
            torch.empty_strided((2, 2), (1, 2), device="npu"),
        ]
        assert all(view.device.type == "npu" and view.dim() for view in views)
        assert x.contiguous() is x and x.to(torch.float32) is x

    assert costs_of(operation) == Costs(0, 0, 0, 0)


def test_an_operator_that_another_calls_is_not_counted() -> None:
    x, gamma = tensor(torch.float16, 3, 16), tensor(torch.float16, 16)
    assert costs_of(lambda: torch_npu.npu_rms_norm(x, gamma, 1e-5)).launches == 1
    assert control.call_count("npu::npu_rms_norm") == 1
    assert control.call_count("aten::mul") == control.call_count("aten::rsqrt") == 0
    assert costs_of(lambda: F.gelu(x)) == Costs(1, 0, 0, 0)
    assert costs_of(lambda: F.softmax(x, -1)) == Costs(1, 0, 0, 0)


def test_operators_can_be_made_to_fail() -> None:
    x = tensor(torch.float32, 4, 4)
    control.set_faults(f"aten::mm:2:{DRIVER_ERROR},aten::exp:1:{DRIVER_ERROR}")
    x @ x
    with pytest.raises(RuntimeError, match=r"aten::mm: failed on request"):
        x @ x
    x @ x
    with pytest.raises(RuntimeError, match=r"aten::exp: failed on request"):
        x.exp()
    assert control.fault_hits() == 2
    assert costs_of(lambda: x.exp()) == Costs(1, 0, 0, 0), "what fails leaves nothing behind"
    with pytest.raises(ValueError, match="aten::mm"):
        control.set_faults("aten::mm")


def test_the_log_has_calls_of_ascendcl_alone() -> None:
    x = tensor(torch.float32)
    control.keep_call_log(True)
    x.exp()
    x.cpu()
    log = control.call_log()
    control.keep_call_log(False)
    assert "aclrtMemcpy" in log
    assert not [name for name in log if "::" in name]


F16, F32, F64 = torch.float16, torch.float32, torch.float64
I32, I64, U8, BOOL = torch.int32, torch.int64, torch.uint8, torch.bool

Operation = Callable[[torch.Tensor], Any]
# For each operator: a call that runs on the AI Core, and one that runs on the AI CPU.
AI_CPU: dict[str, tuple[Operation, list[torch.dtype], list[torch.dtype]]] = {
    "add": (lambda x: x + x, [F16, F32, I32, I64, BOOL], [F64, torch.int16]),
    "add a number": (lambda x: x + 1, [F16, F32, I32, I64], [F64]),
    "argmax": (lambda x: x.argmax(-1), [F32, I32, I64], [F64]),
    "argsort": (lambda x: x.argsort(-1), [F16, F32], [I32, I64]),
    "bincount": (lambda x: torch.bincount(x[0]), [], [I32, I64]),
    "bitwise_not": (lambda x: ~x, [BOOL, torch.int16], [I32, I64]),
    "copy": (lambda x: x.t().contiguous(), [F16, F32, I64, BOOL], [F64]),
    "cumsum": (lambda x: x.cumsum(0), [F16, F32], [I32, I64, BOOL]),
    "cumsum of int32": (lambda x: x.cumsum(0, dtype=I32), [I32, I64, F32], []),
    "cummax": (lambda x: x.cummax(0), [], [F32, I64]),
    "exp": (lambda x: x.exp(), [F16, F32, I32, I64], [F64]),
    "fill_": (lambda x: x.fill_(1), [F16, F32, I64, BOOL], [U8, F64]),
    "floor_divide": (lambda x: x // 2, [F16, F32, I32], [I64, F64]),
    "gather": (lambda x: x.gather(0, rows().view(1, 2)), [F16, F32, I64], [BOOL, F64]),
    "greater": (lambda x: x > 0, [F16, I32, I64], [F64]),
    "histc": (lambda x: torch.histc(x, 4, 0, 3), [F32], [F64]),
    "index": (lambda x: x[rows()], [F16, F32, I64, BOOL, U8], [F64]),
    "index of different shapes": (lambda x: x[rows(), rows()[:1]], [], [F32, I64]),
    "index of axes apart": (lambda x: x.view(4, 2, 3)[rows(), :, rows()], [], [F32]),
    "index_add_": (
        lambda x: x.index_add_(0, rows(), two_rows(x.dtype)),
        [F16, F32, I32],
        [I64, BOOL, F64],
    ),
    "index_put_": (
        lambda x: put(x, two_rows(x.dtype)),
        [F16, F32, I32, I64, BOOL],
        [F64, torch.int16],
    ),
    "masked_fill": (lambda x: x.masked_fill_(mask(), 1), [F16, F32, I32, BOOL], [I64, F64]),
    "masked_select": (lambda x: x.masked_select(mask()), [F16, F32, I64, F64], []),
    "mean": (lambda x: x.mean(), [F16, F32], [F64]),
    "nonzero": (lambda x: x.nonzero(), [F16, F32, BOOL, U8], [I32, I64, F64]),
    "nonzero of a number": (lambda x: x[0, 0].nonzero(), [], [F32, BOOL]),
    "pow": (lambda x: x.pow(3), [F16, F32, I32], [I64, F64]),
    "scatter_": (lambda x: x.scatter_(0, rows().view(1, 2), 7), [F16, F32, I32], [I64, BOOL]),
    "searchsorted": (lambda x: torch.searchsorted(x[0], x), [], [F32, I64]),
    "softmax": (lambda x: x.softmax(-1), [F16, F32], [F64]),
    "sort": (lambda x: x.sort(-1), [F16, F32], [I32, I64, F64]),
    "sort of one": (lambda x: x[:, :1].sort(-1), [], [F16, F32]),
    "sum": (lambda x: x.sum(), [F16, F32, I32, I64, BOOL], [F64]),
    "topk": (lambda x: x.topk(2), [F16, F32], [I32, I64]),
    "to float16": (lambda x: x.to(F16), [F32, I32, I64, BOOL, U8], [F64]),
    "to float64": (lambda x: x.to(F64), [], [F16, F32, I32, I64]),
    "true division": (lambda x: x / 2, [F16, F32, I32, I64], [F64]),
    "unique": (lambda x: x.unique(), [], [F32, I64]),
    "where": (lambda x: torch.where(mask(), x, x), [F16, F32, I64], [BOOL, F64]),
    "zero_": (lambda x: x.zero_(), [F16, F32, I64, BOOL, U8], [F64]),
}


@cache
def rows() -> torch.Tensor:
    return torch.tensor([2, 0]).npu()


@cache
def mask() -> torch.Tensor:
    return torch.ones(4, 6, dtype=torch.bool).npu()


@cache
def two_rows(dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.ones(2, 6).to(dtype).npu()


@cache
def numbers() -> torch.Tensor:
    return torch.ones(24).npu()


@pytest.fixture(autouse=True, scope="module")
def made_before() -> Iterator[None]:
    """What operations need besides, so that it is not measured."""
    for tensor_of in (rows, mask, two_rows, numbers):
        tensor_of()
    yield
    for tensor_of in (rows, mask, two_rows, numbers):
        tensor_of.cache_clear()
    torch.npu.empty_cache()


def put(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return x.index_put_((rows(),), values)


@pytest.mark.parametrize("name", AI_CPU)
def test_where_operators_run(name: str) -> None:
    operation, ai_core, ai_cpu = AI_CPU[name]
    for dtype in ai_core + ai_cpu:
        x = tensor(dtype)
        two_rows(dtype)
        costs = costs_of(lambda x=x: operation(x))
        assert (costs.launches, costs.on_ai_cpu) == (1, int(dtype in ai_cpu)), dtype


def test_factories_run_where_their_type_says() -> None:
    def operation() -> None:
        torch.zeros(3, dtype=F64, device="npu")
        torch.arange(3, dtype=F64, device="npu")
        torch.randperm(3, device="npu")

    assert costs_of(operation) == Costs(3, 3, 0, 0)

    def others() -> None:
        torch.zeros(3, dtype=I64, device="npu")
        torch.arange(3, device="npu")
        torch.full((3,), 2.0, device="npu")

    assert costs_of(others) == Costs(3, 0, 0, 0)


def test_how_much_index_put_writes_decides_for_int64() -> None:
    few, many = torch.arange(100).npu(), torch.arange(101).npu()
    for width, index, dtype, on_ai_cpu in (
        (70, few, I64, 0),
        (71, few, I64, 1),
        (1, many, I64, 1),
        (71, many, F32, 0),
        (71, many, I32, 0),
        (1, few, F64, 1),
    ):
        x, value = tensor(dtype, 200, width), tensor(dtype, 1)
        costs = costs_of(lambda x=x, i=index, v=value: x.index_put_((i,), v))
        assert costs == Costs(1, on_ai_cpu, 0, 0), (width, dtype)


def test_multinomial_of_few_probabilities() -> None:
    for count, on_ai_cpu in ((5000, 1), (5001, 0)):
        probabilities = tensor(F32, count)
        assert costs_of(lambda p=probabilities: p.multinomial(1)).on_ai_cpu == on_ai_cpu


def test_the_host_waits_for_sizes_and_values() -> None:
    x, one = tensor(F32), tensor(F32, 1)
    integers = tensor(I64, 5)
    for name, operation, launches, waits in (
        ("item", lambda: one.item(), 0, 1),
        ("bool", lambda: bool(one), 0, 1),
        ("equal", lambda: torch.equal(x, x), 1, 1),
        ("nonzero", lambda: x.nonzero(), 1, 1),
        ("masked_select", lambda: x.masked_select(mask()), 1, 1),
        ("unique", lambda: integers.unique(), 1, 1),
        ("bincount", lambda: integers.bincount(), 1, 2),
        ("repeats", lambda: torch.repeat_interleave(integers), 1, 1),
        ("repeats of a known size", lambda: torch.repeat_interleave(integers, output_size=5), 1, 0),
        ("index", lambda: x[rows()], 1, 0),
        ("index by a mask", lambda: x[mask()], 1, 1),
        ("put by indices", lambda: put(x, two_rows(x.dtype)), 1, 0),
        ("put by a mask", lambda: x.index_put_((mask(),), numbers()), 1, 1),
        ("fill by a mask", lambda: x.masked_fill_(mask(), 2.0), 1, 0),
        ("copy to the host", lambda: x.cpu(), 0, 1),
        ("copy to the host in another order", lambda: x.t().cpu(), 1, 1),
        ("copy from the host", lambda: x.copy_(torch.ones(4, 6)), 0, 1),
        ("copy from the host as another type", lambda: x.copy_(torch.ones(4, 6, dtype=F64)), 0, 1),
        ("copy to other strides", lambda: x.t().copy_(torch.ones(6, 4)), 1, 1),
        ("copy on the device", lambda: x.clone(), 1, 0),
        ("synchronize", lambda: torch.npu.synchronize(), 0, 1),
    ):
        costs = costs_of(operation)
        assert (costs.launches, costs.waits) == (launches, waits), name


def test_waits_are_calls_of_ascendcl_and_can_fail() -> None:
    x = tensor(F32)
    costs_of(lambda: x.nonzero())
    assert control.call_count("aclrtSynchronizeStreamWithTimeout") == 1
    control.set_faults(f"aclrtSynchronizeStreamWithTimeout:1:{DRIVER_ERROR}:2")
    with pytest.raises(RuntimeError, match=str(DRIVER_ERROR)):
        x.nonzero()
    with pytest.raises(RuntimeError, match=str(DRIVER_ERROR)):
        x[0, 0].item()
    assert control.fault_hits() == 2
    assert x.nonzero().shape == (24, 2)


def test_a_capturing_stream_refuses_to_wait_and_goes_on() -> None:
    x = tensor(F32)
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        ok("aclmdlRICaptureBegin", stream.npu_stream, THREAD_LOCAL)
        for operation in (lambda: x[0, 0].item(), lambda: x.nonzero(), lambda: x[mask()]):
            with pytest.raises(RuntimeError, match=str(STREAM_CAPTURED)):
                operation()
        graph = c_void_p()
        assert call("aclmdlRICaptureEnd", stream.npu_stream, byref(graph)) == 0
        ok("aclmdlRIDestroy", graph)
        assert x[0, 0].item() == 1


INDEXING: dict[str, tuple[Operation, int]] = {
    "index": (lambda x: x[rows()], 1),
    "index_select": (lambda x: x.index_select(0, rows()), 1),
    "gather": (lambda x: x.gather(0, rows().view(1, 2)), 1),
    "embedding": (lambda x: F.embedding(rows(), x), 1),
    "index_put_": (lambda x: put(x, two_rows()), 2),
    "index_copy_": (lambda x: x.index_copy_(0, rows(), two_rows()), 2),
    "index_add_": (lambda x: x.index_add_(0, rows(), two_rows()), 2),
    "index_fill_": (lambda x: x.index_fill_(0, rows(), 2), 2),
    "scatter_": (lambda x: x.scatter_(0, rows().view(1, 2), 7.0), 2),
    "scatter_add_": (lambda x: x.scatter_add_(0, rows().view(1, 2), two_rows()), 2),
}


@pytest.mark.parametrize("name", INDEXING)
def test_indexing_copies_what_is_not_contiguous(name: str) -> None:
    operation, copies = INDEXING[name]
    whole = tensor(F32, 4, 12)
    assert costs_of(lambda: operation(whole[:, :6])) == Costs(1, 0, copies * 4 * 6 * 4, 0)
    assert costs_of(lambda: operation(whole[:2].view(4, 6))) == Costs(1, 0, 0, 0)


def test_other_operators_take_arguments_as_they_lie() -> None:
    x = tensor(F32, 4, 12)[:, :6]
    assert costs_of(lambda: (x + x).exp()) == Costs(2, 0, 0, 0)
