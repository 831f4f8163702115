# SPDX-License-Identifier: Apache-2.0
"""Attention by torch_npu's operator, compared with float64 and with plain PyTorch's."""

import logging
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")

NPU = torch.device("npu:0")
DTYPES = [torch.float16, torch.bfloat16]
FUSED, WRITE = "npu::npu_fused_infer_attention_score", "atb::_npu_reshape_and_cache"

# Requests as (new tokens, cached tokens).
DECODE = [(1, 0), (1, 15), (1, 16), (1, 17), (1, 47), (1, 48)]
PREFILL = [(5, 0), (1, 0), (48, 0), (33, 0)]
CHUNKED = [(16, 16), (7, 26), (33, 64)]
MIXED = [(1, 31), (20, 0), (7, 26), (1, 3), (3, 64), (50, 13), (1, 16)]


@pytest.fixture(autouse=True)
def fused():
    """The operators, with nothing tried so far. torch keeps what it has freed."""
    from vllm_sleep_ascend.native.attention import choice, fused
    from vllm_sleep_ascend.sim import control

    choice._choices.clear()
    with torch.inference_mode():
        yield fused
    control.set_faults("")
    choice._choices.clear()


def choose(layer):
    from vllm_sleep_ascend.native.attention import choice

    return choice.choose(NPU, layer)


def chosen(layout=None, writes=False):
    from vllm_sleep_ascend.native.attention import choice, fused

    return choice.Choice(layout and fused.Layout(layout), writes)


def layer(fused, **changes):
    plain = fused.Layer(4, 2, 64, torch.bfloat16, block_size=16, scale=0.125)
    return replace(plain, **changes)


def launches(operation):
    """What the operation gives, and how often each operator was launched."""
    from vllm_sleep_ascend.sim import control

    control.reset_counters()
    result = operation()
    return result, {name: control.call_count(name) for name in (FUSED, WRITE)}


class Engine:
    """A cache with a batch's tokens, written and read as a layer does."""

    def __init__(self, layer, requests, seed=0):
        from vllm_sleep_ascend.native.attention.kv_cache import Rows

        self.layer, self.requests = layer, requests
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(layer.dtype)

        self.lengths = [new + cached for new, cached in requests]
        self.ends = list(accumulate(new for new, _ in requests))
        self.query = 4 * random(self.ends[-1], layer.heads, layer.head_size)
        kv = (layer.kv_heads, layer.head_size)
        self.keys = [random(n, *kv) for n in self.lengths]
        self.values = [random(n, *kv) for n in self.lengths]
        needed = [-(-n // layer.block_size) for n in self.lengths]
        blocks = 1 + sum(needed)
        # Whatever holds no token of a request holds NaN.
        shape = (blocks, layer.block_size, layer.kv_heads, 2 * layer.head_size)
        self.cache = torch.full(shape, torch.nan, dtype=layer.dtype, device=NPU).transpose(1, 2)
        free = iter((torch.randperm(blocks - 1, generator=generator) + 1).tolist())
        self.table = torch.zeros(len(requests), max(needed) + 1, dtype=torch.int32)
        slots = []
        for row, (count, length) in enumerate(zip(needed, self.lengths, strict=True)):
            self.table[row, :count] = torch.tensor([next(free) for _ in range(count)])
            position = torch.arange(length)
            block = self.table[row][position // layer.block_size].long()
            slots.append(block * layer.block_size + position % layer.block_size)
        self.rows = Rows(torch.cat(slots).to(NPU), layer.block_size)

    def write(self, choice):
        from vllm_sleep_ascend.native.attention import fused
        from vllm_sleep_ascend.native.attention.kv_cache import halves, write_kv

        key, value = torch.cat(self.keys).to(NPU), torch.cat(self.values).to(NPU)
        if choice.writes:
            fused.write(halves(self.cache, self.layer.head_size), key, value, self.rows)
        else:
            write_kv(self.cache, key, value, self.rows)

    def batch(self, fused):
        table, size = self.table.to(NPU), self.layer.block_size
        return fused.Batch(self.ends, self.lengths, table, fused.causal_mask(NPU), size)

    def attend(self, choice):
        from vllm_sleep_ascend.native.attention import fused
        from vllm_sleep_ascend.native.attention.kv_cache import halves

        query = self.query.to(NPU)
        output = torch.full_like(query, torch.nan)
        both, batch = halves(self.cache, self.layer.head_size), self.batch(fused)
        assert batch.takes(choice.layout, len(both) - 1)
        fused.attend(self.layer, choice.layout, query, both, output, batch)
        return output.cpu()

    def attend_in_pytorch(self):
        from vllm_sleep_ascend.native.attention.paged import Rules, paged_attention
        from vllm_sleep_ascend.native.attention.tiles import make_tile, plan_tiles

        layer, new = self.layer, [new for new, _ in self.requests]
        starts, lengths = torch.tensor([0, *self.ends]), torch.tensor(self.lengths)
        plans = plan_tiles(
            new,
            self.lengths,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            content=2 * layer.head_size,
            window=layer.window,
        )
        tiles = [
            make_tile(plan, new, starts.to(NPU), lengths.to(NPU), self.table.to(NPU), layer.window)
            for plan in plans
        ]
        query = self.query.to(NPU)
        output = torch.full_like(query, torch.nan)
        rules = Rules(layer.scale, layer.head_size, window=layer.window)
        paged_attention(query, self.cache, output, tiles, rules)
        return output.cpu()

    def expected(self):
        """In float64."""
        layer, rows = self.layer, []
        group = layer.heads // layer.kv_heads
        for (start, end), key, value in zip(
            pairwise([0, *self.ends]), self.keys, self.values, strict=True
        ):
            query = self.query[start:end].double().transpose(0, 1)
            key, value = (
                side.double().repeat_interleave(group, 1).transpose(0, 1) for side in (key, value)
            )
            scores = query @ key.mT * layer.scale
            last = torch.arange(key.shape[1] - query.shape[1], key.shape[1]).unsqueeze(1)
            distance = torch.arange(key.shape[1]) - last
            hidden = distance > 0
            if layer.window is not None:
                hidden |= distance <= -layer.window
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            rows.append((weights @ value).transpose(0, 1))
        return torch.cat(rows)


def close(got, want, dtype):
    """Results are rounded once: at most one step of the type, and a little for sums."""
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=step, atol=1e-4)


BATCHES = {"decode": DECODE, "prefill": PREFILL, "chunked": CHUNKED, "mixed": MIXED}
LAYERS = {
    "equal heads": {"heads": 4, "kv_heads": 4},
    "14 to 2": {"heads": 14, "kv_heads": 2},
    "one kv head": {"heads": 7, "kv_heads": 1},
    "heads of 128": {"head_size": 128},
    "heads of 192": {"head_size": 192},
    "blocks of 32": {"block_size": 32},
    "blocks of 128": {"block_size": 128},
    "window 1": {"window": 1},
    "window 5": {"window": 5},
    "window 16": {"window": 16},
    "window 1000": {"window": 1000},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS.keys())
def test_any_batch_is_one_launch(fused, changes, requests, dtype):
    here = layer(fused, dtype=dtype, **changes)
    choice = choose(here)
    assert choice == chosen("TND", writes=True)
    engine = Engine(here, requests)
    _, counts = launches(lambda: engine.write(choice))
    assert counts == {FUSED: 0, WRITE: 1}
    got, counts = launches(lambda: engine.attend(choice))
    assert counts == {FUSED: 1, WRITE: 0}
    close(got, engine.expected(), dtype)
    close(engine.attend_in_pytorch(), engine.expected(), dtype)


@pytest.mark.parametrize("head_size", [16, 32, 80, 96, 256])
def test_decoding_is_one_launch_for_heads_of_other_sizes(fused, head_size):
    here = layer(fused, head_size=head_size)
    choice = choose(here)
    assert choice == chosen("BSH", writes=True)
    engine = Engine(here, DECODE)
    engine.write(choice)
    got, counts = launches(lambda: engine.attend(choice))
    assert counts == {FUSED: 1, WRITE: 0}
    close(got, engine.expected(), here.dtype)


def test_both_ways_write_the_same_cache(fused):
    here = layer(fused)
    by_operator, by_pytorch = Engine(here, MIXED), Engine(here, MIXED)
    by_operator.write(chosen(writes=True))
    by_pytorch.write(chosen())
    same = by_operator.cache.cpu().view(torch.int16) == by_pytorch.cache.cpu().view(torch.int16)
    assert same.all()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"head_size": 40},
        {"head_size": 528},
        {"head_size": 32, "window": 16},
        {"head_size": 32, "block_size": 1024},
        {"block_size": 8},
        {"block_size": 2048},
        {"heads": 130},
        {"heads": 272, "kv_heads": 16},
    ],
    ids=str,
)
def test_what_the_documents_exclude_is_not_tried(fused, changes):
    choice, counts = launches(lambda: choose(layer(fused, **changes)))
    assert choice == chosen() and counts == {FUSED: 0, WRITE: 0}


def test_a_310p_computes_in_pytorch(fused, monkeypatch):
    from vllm_sleep_ascend.native.platform import NPUPlatform

    monkeypatch.setattr(NPUPlatform, "get_device_name", lambda *_: "Ascend310P3")
    choice, counts = launches(lambda: choose(layer(fused)))
    assert choice == chosen() and counts == {FUSED: 0, WRITE: 0}


def test_each_kind_of_layer_is_tried_once(fused):
    _, first = launches(lambda: choose(layer(fused)))
    assert first == {FUSED: 2, WRITE: 1}
    _, again = launches(lambda: choose(layer(fused)))
    assert again == {FUSED: 0, WRITE: 0}


@pytest.fixture
def warnings(caplog, monkeypatch):
    from vllm_sleep_ascend.native.attention import choice

    monkeypatch.setattr(choice.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize(
    "operator,layout,writes",
    [(FUSED, None, True), (WRITE, "TND", False)],
    ids=["attends", "writes"],
)
def test_an_operator_that_fails_is_not_used(fused, warnings, operator, layout, writes):
    from vllm_sleep_ascend.sim import control

    control.set_faults(f"{operator}:1:561103:9")
    choice = choose(layer(fused))
    assert choice == chosen(layout, writes)
    (warning,) = warnings.messages
    assert f"{operator.split('::')[1]} is not used, and PyTorch computes instead" in warning
    assert "4 heads of 64 over 2 in torch.bfloat16" in warning and "561103" in warning


def test_decoding_alone_where_a_cann_has_no_other_layout(fused, warnings, monkeypatch):
    """CANN 8.3 takes layout TND for heads of 192 alone (vllm-ascend #8045)."""
    from vllm_sleep_ascend.sim import control

    control.set_faults(f"{FUSED}:1:561002")
    assert choose(layer(fused)) == chosen("BSH", writes=True)
    assert not warnings.messages


def test_wrong_results_are_not_used(fused, warnings, monkeypatch):
    """A window one token wider, as another reading of the document would have it."""
    right = fused.arguments

    def wider(*given):
        result = right(*given)
        return {**result, "pre_tokens": result["pre_tokens"] + 1}

    monkeypatch.setattr(fused, "arguments", wider)
    choice = choose(layer(fused, window=16))
    assert choice == chosen(None, writes=True)
    assert "its results differ from PyTorch's by" in warnings.messages[0]


@pytest.mark.parametrize("layout", ["TND", "BSH"])
def test_what_a_batch_may_be(fused, layout):
    layout = fused.Layout(layout)

    def takes(ends, lengths, blocks=20):
        nothing = torch.zeros(1, dtype=torch.int32)
        return fused.Batch(ends, lengths, nothing, nothing, 16).takes(layout, blocks)

    one_row_each = layout is fused.Layout.BSH
    assert takes([1, 2], [160, 160])
    assert not takes([1, 2], [160, 161]), "more blocks than the cache has"
    assert takes([2, 3], [5, 5]) != one_row_each
    many = list(range(1, 4098))
    assert takes(many, [1] * 4097, 4097) == one_row_each
    assert takes([1], [262144], 1 << 20) and not takes([1], [262145], 1 << 20)
    assert not takes([], [])
