# SPDX-License-Identifier: Apache-2.0
"""Operators on the device give the CPU's results."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

Function = Callable[[torch.Tensor, torch.Tensor], Any]

# Each is called with an 8x16 tensor of the type under test and five row numbers.
OPERATORS: dict[str, Function] = {
    "add": lambda x, i: x + x * 2 - 1,
    "add_": lambda x, i: x.add_(1).mul_(2),
    "add out=": lambda x, i: torch.add(x, x, out=torch.empty_like(x)),
    "add out= of another size": lambda x, i: torch.add(x, x, out=x.new_empty(0)),
    "all": lambda x, i: (x > -9).all(),
    "amax": lambda x, i: x.amax(-1, keepdim=True),
    "any": lambda x, i: (x > 0).any(0),
    "argmax": lambda x, i: x.argmax(-1),
    "argsort": lambda x, i: x.argsort(dim=-1, stable=True),
    "baddbmm": lambda x, i: torch.baddbmm(x[:2, None, :4], *batches(x), alpha=0.5),
    "bincount": lambda x, i: torch.bincount(i),
    "bitwise": lambda x, i: (i & 1) | 2,
    "bmm": lambda x, i: torch.bmm(*batches(x)),
    "cat": lambda x, i: torch.cat([x, x[:2]], 0),
    "chunk": lambda x, i: x.chunk(3, -1),
    "clamp": lambda x, i: x.clamp(-0.5, 0.5),
    "compare": lambda x, i: (x > 0, x == x, x.isnan(), x.isfinite()),
    "contiguous": lambda x, i: x.t().contiguous(),
    "copy_ within one storage": lambda x, i: x[:, :8].copy_(x[:, 8:]),
    "cross_entropy": lambda x, i: F.cross_entropy(x.float()[:5], i),
    "cumsum": lambda x, i: x.cumsum(-1),
    "diff": lambda x, i: x.diff(),
    "einsum": lambda x, i: torch.einsum("ij,kj->ik", x, x),
    "embedding": lambda x, i: F.embedding(i, x),
    "empty reduction": lambda x, i: x[:0].sum(),
    "equal": lambda x, i: torch.equal(x, x.clone()),
    "expand": lambda x, i: x[:, None].expand(8, 3, 16).reshape(24, 16),
    "flip": lambda x, i: x.flip(0),
    "foreach": lambda x, i: torch._foreach_add([x, x[:2]], [x, x[:2]], alpha=2),
    "foreach_": lambda x, i: (torch._foreach_mul_([x], 2.0), x)[1],
    "foreach norm": lambda x, i: torch._foreach_norm([x.float(), x[:3].float()]),
    "full_like": lambda x, i: torch.full_like(x, 3),
    "gather": lambda x, i: x.gather(0, i.view(1, 5)),
    "gelu": lambda x, i: F.gelu(x),
    "index": lambda x, i: (x[i], x[i, :5], x[None, i], x[x > 0]),
    "index_add_": lambda x, i: x.index_add_(0, i, torch.ones_like(x[:5])),
    "index_copy_": lambda x, i: x.index_copy_(0, i, torch.ones_like(x[:5])),
    "index_fill_": lambda x, i: x.index_fill_(0, i, 2),
    "index_put_": lambda x, i: x.index_put_((i, i), torch.ones_like(x[0, :5])),
    "index_put_ accumulating": lambda x, i: x.index_put_((i,), x[:5].clone(), accumulate=True),
    "index_select": lambda x, i: x.index_select(0, i),
    "item": lambda x, i: (x[0, 0].item(), bool(x[0, 0] == x[0, 0]), int(i[2])),
    "layer_norm": lambda x, i: F.layer_norm(x, (16,), torch.ones_like(x[0]), x[1]),
    "lerp": lambda x, i: torch.lerp(x, x * 2, 0.25),
    "linear": lambda x, i: F.linear(x, x[:3], x[0, :3]),
    "linear of 3 dimensions": lambda x, i: F.linear(x.view(2, 4, 16), x[:3]),
    "log_softmax": lambda x, i: F.log_softmax(x, -1),
    "logsumexp": lambda x, i: x.float().logsumexp(-1),
    "masked_fill": lambda x, i: x.masked_fill(x > 0, -1),
    "masked_scatter": lambda x, i: x.masked_scatter(x > 0, torch.ones_like(x)),
    "masked_select": lambda x, i: x.masked_select(x > 0),
    "matmul": lambda x, i: (x @ x.T, x @ x[0], x[0] @ x[0]),
    "max": lambda x, i: (x.max(), x.max(-1), torch.maximum(x, -x)),
    "mean": lambda x, i: x.float().mean((0, 1)),
    "median": lambda x, i: x.float().median(-1),
    "nonzero": lambda x, i: ((x > 0).nonzero(), (x > 0).nonzero(as_tuple=True)),
    "norm": lambda x, i: x.float().norm(),
    "one_hot": lambda x, i: F.one_hot(i, 8),
    "pad": lambda x, i: F.pad(x, (1, 2), value=3),
    "pow": lambda x, i: x**2,
    "prod": lambda x, i: x.float()[:2].prod(-1),
    "quantile": lambda x, i: x.float().quantile(0.5, dim=-1),
    "remainder": lambda x, i: (i % 3, i // 2, -i),
    "repeat": lambda x, i: (x.repeat(2, 1), x.repeat_interleave(2, 0)),
    "rms_norm": lambda x, i: F.rms_norm(x, (16,), x[0]),
    "roll": lambda x, i: x.roll(3, 1),
    "rsqrt": lambda x, i: (x.abs() + 1).rsqrt(),
    "scatter_": lambda x, i: x.scatter_(0, i.view(1, 5), 7.0),
    "scatter_ of a source": lambda x, i: x.scatter_(0, i.view(1, 5), torch.ones_like(x)),
    "scatter_add_": lambda x, i: x.scatter_add_(0, i.view(1, 5), torch.ones_like(x)),
    "scatter_reduce": lambda x, i: x.scatter_reduce(0, i.view(1, 5), x.clone(), "amax"),
    "sdpa": lambda x, i: F.scaled_dot_product_attention(*[x.view(1, 2, 4, 16)] * 3),
    "sdpa causal": lambda x, i: F.scaled_dot_product_attention(
        *[x.view(1, 2, 4, 16)] * 3, is_causal=True
    ),
    "searchsorted": lambda x, i: torch.searchsorted(x.float().sort(-1)[0], x.float()),
    "select": lambda x, i: x[2].unsqueeze(0).squeeze(),
    "setitem": lambda x, i: (x.__setitem__((i, slice(2, 4)), 3), x)[1],
    "silu": lambda x, i: F.silu(x),
    "softmax": lambda x, i: F.softmax(x, -1),
    "sort": lambda x, i: x.sort(dim=-1, stable=True, descending=True),
    "split": lambda x, i: x.split([3, 5]),
    "stack": lambda x, i: torch.stack([x, x], 1),
    "std": lambda x, i: (x.float().std(), x.float().var(-1)),
    "sum": lambda x, i: (x.float().sum(), x.float().sum(0), i.sum()),
    "take_along_dim": lambda x, i: x[:5].take_along_dim(i.view(5, 1), 1),
    "to": lambda x, i: (x.double(), x.half(), x.bfloat16(), x.int(), x.bool()),
    "tolist": lambda x, i: x.tolist(),
    "topk": lambda x, i: x.topk(3),
    "tril": lambda x, i: (x.tril(), x.triu(1)),
    "unfold": lambda x, i: x.unfold(1, 4, 2),
    "unique": lambda x, i: torch.unique(i, return_inverse=True, return_counts=True),
    "where": lambda x, i: torch.where(x > 0, x, -x),
    "where with a number": lambda x, i: torch.where(x > 0, 0.0, x),
    "zero_": lambda x, i: x.zero_(),
}

FACTORIES: dict[str, Callable[[str], torch.Tensor]] = {
    "arange": lambda d: torch.arange(1, 9, 2, device=d, dtype=torch.int32),
    "eye": lambda d: torch.eye(3, device=d),
    "full": lambda d: torch.full((3,), 2.0, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 5, device=d),
    "ones": lambda d: torch.ones(3, device=d, dtype=torch.bool),
    "scalar_tensor": lambda d: torch.scalar_tensor(3.0, device=d),
    "tensor": lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
    "tril_indices": lambda d: torch.tril_indices(3, 3, device=d),
    "zeros": lambda d: torch.zeros(0, 3, device=d),
}

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def batches(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.reshape(2, 4, 16), x.reshape(2, 16, 4)


def compare(actual: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, torch.Tensor):
        assert actual.device.type == "npu"
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(
            actual.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            compare(one, other, tolerance)
    else:
        assert actual == expected


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """torch keeps memory and streams, so their numbers are not compared."""
    torch.npu.set_device(0)
    torch.manual_seed(1)
    yield
    torch.npu.empty_cache()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(8, 16).to(dtype)
    rows = torch.tensor([3, 0, 7, 1, 4])
    expected = OPERATORS[name](values.clone(), rows.clone())
    actual = OPERATORS[name](values.npu(), rows.npu())
    compare(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", FACTORIES)
def test_factory(name: str) -> None:
    compare(FACTORIES[name]("npu"), FACTORIES[name]("cpu"), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 40])
@pytest.mark.parametrize(("depth", "columns"), [(96, 70), (61, 33), (7, 5)])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_round_once(
    rows: int, depth: int, columns: int, transposed: bool, dtype: torch.dtype
) -> None:
    a = torch.randn(rows, depth).to(dtype)
    b = torch.randn(columns, depth).to(dtype).t() if transposed else torch.randn(depth, columns)
    b = b.to(dtype)
    bias = torch.randn(columns).to(dtype)
    exact = a.double() @ b.double()
    unit = torch.finfo(dtype).eps
    product = (a.npu() @ b.npu()).cpu()
    torch.testing.assert_close(product.double(), exact, rtol=0.51 * unit, atol=1e-4)
    summed = torch.addmm(bias.npu(), a.npu(), b.npu(), beta=2, alpha=0.5).cpu()
    exact = 2 * bias.double() + 0.5 * exact
    torch.testing.assert_close(summed.double(), exact, rtol=0.51 * unit, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_keep_special_values(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.5, -tiny, tiny]
    weights = torch.tensor(values).to(dtype)[:, None]
    product = F.linear(torch.ones(1, 1, dtype=dtype).npu(), weights.npu()).cpu()
    torch.testing.assert_close(product[0], weights[:, 0], rtol=0, atol=0, equal_nan=True)


def test_a_row_is_the_same_in_a_batch() -> None:
    weights = torch.randn(50, 64, dtype=torch.float16).npu()
    rows = torch.randn(16, 64, dtype=torch.float16).npu()
    together = F.linear(rows, weights)
    for i in range(16):
        assert torch.equal(F.linear(rows[i : i + 1], weights)[0], together[i])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_other_types_travel(dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (5,)).to(dtype)
    there = values.npu()
    assert there.device.type == "npu"
    assert there.cpu().tolist() == values.tolist()
    assert there.clone()[1:3].cpu().tolist() == values[1:3].tolist()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_copies_between_devices(non_blocking: bool) -> None:
    values = torch.arange(24.0).view(4, 6)
    pairs = [
        (torch.empty(4, 6, device="npu"), values),
        (torch.empty(4, 6), values.npu()),
        (torch.empty(6, 4).t(), values.npu()),
        (torch.empty(6, 4, device="npu").t(), values),
        (torch.empty(4, 6, dtype=torch.bfloat16, device="npu"), values),
        (torch.empty(4, 6, dtype=torch.int64), values.npu()),
        (torch.empty(4, 6, device="npu:1"), values.npu()),
        (torch.empty(3, 4, 6, device="npu"), values),
        (torch.empty(4, 6).pin_memory(), values.npu()),
        (torch.empty(4, 6, device="npu"), values.pin_memory()),
    ]
    for to, source in pairs:
        to.copy_(source, non_blocking=non_blocking)
        torch.npu.synchronize()
        assert torch.equal(to.cpu().double(), values.double().expand(to.shape))


def test_tensors_of_two_devices_do_not_mix() -> None:
    here, there = torch.ones(3, device="npu"), torch.ones(3)
    for function in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here @ there,
        lambda: torch.mm(here[None], there[:, None]),
        lambda: here + torch.ones(3, device="npu:1"),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            function()
    assert (here * torch.tensor(2.0)).tolist() == [2, 2, 2], "numbers mix"


def test_views_stay_views() -> None:
    x = torch.zeros(4, 4, device="npu")
    x[1].fill_(1)
    x.t()[2].add_(1)
    x.diagonal().fill_(5)
    assert x.tolist() == [[5, 0, 1, 0], [1, 5, 2, 1], [0, 0, 5, 0], [0, 0, 1, 5]]
    y = x.reshape(16)
    assert y.data_ptr() == x.data_ptr()
    assert x.add_(1) is x


def test_results_are_device_memory() -> None:
    before = torch.npu.memory_allocated()
    x = torch.ones(1 << 20, device="npu")
    y = x + 1
    assert torch.npu.memory_allocated() >= before + 2 * (4 << 20)
    del x, y
    assert torch.npu.memory_allocated() == before


def test_seeds_repeat() -> None:
    def draw(generator: torch.Generator | None = None) -> list[list[float]]:
        empty = torch.empty(4, device="npu")
        return [
            torch.rand(4, device="npu", generator=generator).tolist(),
            torch.randint(0, 99, (4,), device="npu", generator=generator).tolist(),
            torch.randperm(4, device="npu", generator=generator).tolist(),
            empty.exponential_(generator=generator).tolist(),
            empty.normal_(generator=generator).tolist(),
            torch.multinomial(torch.ones(9, device="npu"), 4, generator=generator).tolist(),
        ]

    torch.npu.manual_seed(3)
    first, second = draw(), draw()
    torch.npu.manual_seed(3)
    state = torch.npu.get_rng_state()
    assert draw() == first != second
    assert draw() == second
    torch.npu.set_rng_state(state)
    assert draw() == first
    own = torch.Generator(device="npu").manual_seed(3)
    assert draw(own) == first
    assert draw(own) == second
    assert draw(torch.Generator(device="npu").manual_seed(4)) != first


def test_random_values_are_spread() -> None:
    values = torch.rand(10000, device="npu")
    assert 0.45 < values.mean().item() < 0.55
    assert values.unique().numel() > 9000
    dropped = F.dropout(torch.ones(10000, device="npu"), 0.25)
    assert 0.2 < (dropped == 0).float().mean().item() < 0.3
