# SPDX-License-Identifier: Apache-2.0
"""torch_npu's operators in place of vLLM's plain PyTorch, and PyTorch for what they do not take."""

import logging
from functools import partial

import pytest
import torch

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = {
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_swiglu",
    "npu_mrope (half)",
    "npu_mrope (interleave)",
}
NPU = torch.device("npu:0")


@pytest.fixture(autouse=True)
def operators():
    """The operators as an engine chooses them. torch keeps what it has freed."""
    from vllm_sleep_ascend.native.dense import layers, norms, operators  # noqa: F401
    from vllm_sleep_ascend.sim import control

    with torch.inference_mode():
        operators.choose(NPU, torch.float32, 64)
        yield operators
    control.set_faults("")
    operators.working.clear()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def working(operators) -> set[str]:
    return {name for name, dtype in operators.working if dtype == torch.float32}


def launches(operation, *operators):
    """What the operation gives, and how often each operator was launched."""
    from vllm_sleep_ascend.sim import control

    control.reset_counters()
    result = operation()
    return result, [control.call_count(f"npu::{operator}") for operator in operators]


@pytest.fixture
def config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()) as config:
        yield config


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_are_used_where_all_work(operators, dtype):
    operators.choose(NPU, dtype, 64)
    assert operators.working >= {(name, dtype) for name in ALL}


def close(got, want, dtype):
    """``want`` is computed in float64. PyTorch's own norms round twice, ours once."""
    steps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), want, rtol=steps, atol=steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 4, 32)])
def test_norms_are_one_launch(operators, dtype, shape):
    from vllm.ir import ops

    from vllm_sleep_ascend.native.dense.norms import PROVIDER

    operators.choose(NPU, dtype, 64)
    x, residual, weight = (random(*s, dtype=dtype) for s in (shape, shape, shape[-1:]))
    want = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    with ops.rms_norm.set_priority([PROVIDER, "native"]):
        got, count = launches(lambda: ops.rms_norm(x.to(NPU), weight.to(NPU), 1e-6), "npu_rms_norm")
    assert count == [1] and got.dtype == dtype
    close(got, want, dtype)

    total = x + residual
    want = torch.nn.functional.rms_norm(total.double(), shape[-1:], weight.double(), 1e-6)
    with ops.fused_add_rms_norm.set_priority([PROVIDER, "native"]):
        (got, got_total), count = launches(
            lambda: ops.fused_add_rms_norm(x.to(NPU), residual.to(NPU), weight.to(NPU), 1e-6),
            "npu_add_rms_norm",
        )
    assert count == [1]
    assert torch.equal(got_total.cpu(), total)
    close(got, want, dtype)


@pytest.mark.parametrize(
    "case",
    ["float32 weight", "no weight", "part of the variance", "no token", "one dimension"],
)
def test_norms_that_the_operators_do_not_take_are_pytorchs(operators, case):
    from vllm.ir import ops

    from vllm_sleep_ascend.native.dense.norms import PROVIDER

    operators.choose(NPU, torch.float16, 64)
    x, weight, variance_size = random(3, 64).half(), random(64).half(), None
    if case == "float32 weight":  # Gemma's
        weight = weight.float()
    elif case == "no weight":
        weight = None
    elif case == "part of the variance":
        variance_size = 32
    elif case == "no token":
        x = x[:0]
    else:
        x = x[0]
    on_npu = None if weight is None else weight.to(NPU)
    for op, inputs in ((ops.rms_norm, (x,)), (ops.fused_add_rms_norm, (x, x))):
        arguments = (*(t.to(NPU) for t in inputs), on_npu, 1e-6, variance_size)
        with op.set_priority([PROVIDER, "native"]):
            got, count = launches(partial(op, *arguments), "npu_rms_norm", "npu_add_rms_norm")
        assert count == [0, 0]
        want = op.impls["native"].impl_fn(*inputs, weight, 1e-6, variance_size)
        torch.testing.assert_close(
            tuple(t.cpu() for t in got) if isinstance(got, tuple) else got.cpu(), want
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_activation_is_one_launch(operators, config, dtype):
    from vllm.model_executor.layers.activation import SiluAndMul

    operators.choose(NPU, dtype, 64)
    x = random(5, 48, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    got, count = launches(lambda: SiluAndMul()(x.to(NPU)), "npu_swiglu")
    assert count == [1]
    close(got, torch.nn.functional.silu(gate) * up, dtype)


def test_an_activation_of_rows_apart_is_pytorchs(config):
    from vllm.model_executor.layers.activation import SiluAndMul

    x = random(5, 96)
    got, count = launches(lambda: SiluAndMul()(x.to(NPU)[:, :48]), "npu_swiglu")
    assert count == [0]
    torch.testing.assert_close(got.cpu(), SiluAndMul.forward_native(x[:, :48]))


ROPES = [
    ("plain", {"rope_type": "default"}),
    ("linear", {"rope_type": "linear", "factor": 2.0}),
    ("dynamic", {"rope_type": "dynamic", "factor": 2.0}),
    (
        "llama3",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
    ),
    ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
]


def rotation(parameters, head_size=32, neox=True, part=1.0, dtype=torch.float32):
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, get_rope

    _ROPE_DICT.clear()  # vLLM keeps them for the life of a process
    parameters = {"rope_theta": 10000.0, "partial_rotary_factor": part, **parameters}
    rope = get_rope(head_size, 64, neox, parameters, dtype)
    _ROPE_DICT.clear()
    return rope


def rotated(rope, query, key):
    """On the NPU and by PyTorch on the host; and the launches of the operator."""
    positions = torch.tensor([3, 0, 63])
    want = rope.forward_static(
        positions,
        query,
        key,
        rope.head_size,
        rope.rotary_dim,
        rope.cos_sin_cache.to(query.dtype),
        rope.is_neox_style,
    )
    got, count = launches(
        lambda: rope(positions.to(NPU), query.to(NPU), None if key is None else key.to(NPU)),
        "npu_mrope",
    )
    return got, want, count


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("name,parameters", ROPES, ids=[name for name, _ in ROPES])
def test_rotary_embeddings_are_one_launch(config, name, parameters, neox):
    rope = rotation(parameters, neox=neox)
    assert type(rope).__name__.startswith("NPU")
    got, want, count = rotated(rope, random(3, 4 * 32), random(3, 2 * 32))
    assert count == [1]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_embeddings_in_16_bits(operators, config, dtype):
    operators.choose(NPU, dtype, 64)
    rope = rotation({"rope_type": "default"}, head_size=64, part=0.5, dtype=dtype)
    query, key = random(3, 4 * 64, dtype=dtype), random(3, 64, dtype=dtype)
    got, want, count = rotated(rope, query, key)
    assert count == [1]
    for ours, theirs in zip(got, want, strict=True):
        steps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.cpu(), theirs, rtol=steps, atol=steps)
    assert torch.equal(got[1].cpu()[:, 32:], key[:, 32:]), "what lies past the rotated part stays"


@pytest.mark.parametrize("case", ["a head of 24", "no key", "heads apart", "16 in bfloat16"])
def test_rotary_embeddings_that_the_operator_does_not_take_are_pytorchs(operators, config, case):
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
    operators.choose(NPU, dtype, 64)
    size = {"a head of 24": 24, "16 in bfloat16": 16}.get(case, 32)
    rope = rotation({"rope_type": "default"}, head_size=size, dtype=dtype)
    query = random(3, 4 * size, dtype=dtype)
    key = None if case == "no key" else random(3, 2 * size, dtype=dtype)
    if case == "heads apart":
        query = query.view(3, 4, size)
    got, want, count = rotated(rope, query, key)
    assert count == [0]
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("operator", sorted({name.split()[0] for name in ALL}))
def test_an_operator_that_this_device_lacks_is_named_and_not_used(
    operators, operator, caplog, monkeypatch
):
    from vllm_sleep_ascend.sim import control

    monkeypatch.setattr(operators.logger, "propagate", True)
    control.set_faults(f"npu::{operator}:1:561103:9")
    with caplog.at_level(logging.WARNING):
        operators.choose(NPU, torch.float32, 64)
    without = {name for name in ALL if name.split()[0] == operator}
    assert working(operators) == ALL - without
    for name in without:
        assert f"{name} is not used" in caplog.text and "561103" in caplog.text


def test_another_type_than_the_engines_is_pytorchs(config):
    """It was not tried."""
    from vllm.model_executor.layers.activation import SiluAndMul

    x = random(5, 48, dtype=torch.float16)
    got, count = launches(lambda: SiluAndMul()(x.to(NPU)), "npu_swiglu")
    assert count == [0]
    torch.testing.assert_close(got.cpu(), SiluAndMul.forward_native(x))


def test_a_head_that_the_rotation_does_not_take_leaves_it_out(operators):
    operators.choose(NPU, torch.float32, 24)
    assert working(operators) == {"npu_rms_norm", "npu_add_rms_norm", "npu_swiglu"}


@pytest.mark.parametrize("chip,used", [("Ascend310P3", False), ("Ascend910_9382", True)])
def test_operators_are_used_on_the_chips_that_their_documents_name(
    operators, monkeypatch, chip, used
):
    monkeypatch.setattr(torch.npu, "get_device_name", lambda device: chip)
    operators.choose(NPU, torch.float32, 64)
    assert bool(working(operators)) == used


def test_a_rotation_that_takes_parts_of_rows_for_whole_ones_is_not_used(operators, monkeypatch):
    """Older CANNs are not documented to take tensors that are not contiguous."""

    def blind(positions, query, key, *rest):
        query, key = (t.as_strided(t.shape, (t.shape[1], 1)) for t in (query, key))
        return rotate(positions, query, key, *rest)

    rotate = operators.rotate
    monkeypatch.setattr(operators, "rotate", blind)
    operators.choose(NPU, torch.float32, 64)
    assert working(operators) == ALL - {"npu_mrope (half)", "npu_mrope (interleave)"}


def test_an_operator_that_computes_something_else_is_not_used(operators, monkeypatch):
    """What a device does wrong is not known beforehand."""
    monkeypatch.setattr(operators, "silu_and_mul", lambda x: x[:, : x.shape[1] // 2] * 0)
    operators.choose(NPU, torch.float32, 64)
    assert working(operators) == ALL - {"npu_swiglu"}


def test_batch_invariance_has_pytorchs(operators, monkeypatch):
    from vllm import envs

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    operators.choose(NPU, torch.float32, 64)
    assert not working(operators)
