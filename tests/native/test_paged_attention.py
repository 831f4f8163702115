# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch attention compared with a loop over requests, heads and rows."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from vllm_sleep_ascend.native.attention import tiles as tiles_module
from vllm_sleep_ascend.native.attention.kv_cache import Rows, halves, read_kv, write_kv
from vllm_sleep_ascend.native.attention.paged import Rules, dense_attention, paged_attention
from vllm_sleep_ascend.native.attention.tiles import make_decode_tiles, make_tile, plan_tiles

NAN = float("nan")


@dataclass
class Case:
    """A batch: ``(new tokens, cached tokens)`` per request, and the layer's attention."""

    requests: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    head_size_v: int = 16
    block_size: int = 16
    window: int | None = None
    rules: dict = field(default_factory=dict)
    layout: tuple[int, ...] = (0, 2, 1, 3)
    """Physical order of the cache's (block, head, token, content)."""
    gap: int = 0
    """Elements between two pages, as in a model with other caches beside attention's."""


PREFILL = [(5, 0), (1, 0), (33, 0)]
DECODE = [(1, 7), (1, 0), (1, 40), (1, 15), (1, 16)]
MIXED = [(1, 31), (20, 0), (7, 26), (1, 3), (3, 64), (0, 5), (50, 13)]

CASES = {
    "prefill": Case(PREFILL),
    "decode": Case(DECODE),
    "mixed": Case(MIXED),
    "one token": Case([(1, 0)]),
    "heads equal": Case(MIXED, heads=4, kv_heads=4),
    "one kv head": Case(MIXED, heads=7, kv_heads=1),
    "14 to 2": Case(MIXED, heads=14, kv_heads=2),
    "block size 1": Case(MIXED, block_size=1),
    "block size 3": Case(MIXED, block_size=3),
    "block size 128": Case(MIXED, block_size=128),
    "head size 80": Case(MIXED, head_size=80, head_size_v=80),
    "value size differs": Case(MIXED, head_size=24, head_size_v=8),
    "window 4": Case(MIXED, window=4),
    "window 1": Case(MIXED, window=1),
    "window larger than all": Case(MIXED, window=1000),
    "soft cap": Case(MIXED, rules={"soft_cap": 2.0}),
    "sinks": Case(MIXED, rules={"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
    "sinks and window": Case(MIXED, window=5, rules={"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
    "alibi": Case(MIXED, rules={"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}),
    "soft cap and window": Case(MIXED, window=9, rules={"soft_cap": 5.0}),
    "not causal": Case(MIXED, rules={"causal": False}),
    "not causal, window": Case(MIXED, window=6, rules={"causal": False}),
    "head-major cache": Case(MIXED, layout=(0, 1, 2, 3)),
    "gaps between the pages": Case(MIXED, gap=48),
    "many alike": Case([(1, n) for n in range(70)]),
}


def reference(query, key, value, position, case, rules):
    """Attention of a query row ``[head_size]`` to ``[keys, ...]`` of its head, in float64."""
    scores = []
    for j in range(key.shape[0]):
        distance = j - position
        out_of_sight = rules.causal and distance > 0
        if rules.window is not None:
            left = distance <= -rules.window
            out_of_sight |= left or (not rules.causal and distance >= rules.window)
        score = float(query.double() @ key[j].double()) * rules.scale
        if rules.soft_cap:
            score = rules.soft_cap * math.tanh(score / rules.soft_cap)
        scores.append(-math.inf if out_of_sight else score)
    return torch.tensor(scores, dtype=torch.float64)


def expected(case, rules, query, keys, values):
    group = case.heads // case.kv_heads
    rows = []
    start = 0
    for (new, cached), key, value in zip(case.requests, keys, values, strict=True):
        for i in range(new):
            heads = []
            for h in range(case.heads):
                kv = h // group
                scores = reference(
                    query[start + i, h], key[:, kv], value[:, kv], cached + i, case, rules
                )
                if rules.alibi_slopes is not None:
                    distance = torch.arange(key.shape[0]) - (cached + i)
                    scores = scores + float(rules.alibi_slopes[h]) * distance
                if rules.sinks is not None:
                    scores = torch.cat((scores, rules.sinks[h : h + 1].double()))
                weights = scores.softmax(0)[: key.shape[0]]
                heads.append(weights @ value[:, kv].double())
            rows.append(torch.stack(heads))
        start += new
    return torch.stack(rows)


def make_tiles(case, rules, block_table, seq_lens_known=None):
    query_lens = [new for new, _ in case.requests]
    seq_lens = [new + cached for new, cached in case.requests]
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    plans = plan_tiles(
        query_lens,
        seq_lens_known or seq_lens,
        heads=case.heads,
        kv_heads=case.kv_heads,
        content=case.head_size + case.head_size_v,
        causal=rules.causal,
        window=case.window,
    )
    exact = torch.tensor(seq_lens, dtype=torch.int32)
    return [
        make_tile(plan, query_lens, query_start, exact, block_table, case.window) for plan in plans
    ]


def batch(case, seed=0):
    """Query, keys and values per request, and a poisoned cache with them, permuted."""
    torch.manual_seed(seed)
    lens = [new + cached for new, cached in case.requests]
    query = torch.randn(sum(new for new, _ in case.requests), case.heads, case.head_size)
    keys = [torch.randn(n, case.kv_heads, case.head_size) for n in lens]
    values = [torch.randn(n, case.kv_heads, case.head_size_v) for n in lens]
    per_request = [-(-n // case.block_size) for n in lens]
    num_blocks = 1 + sum(per_request) + 3
    shape = (num_blocks, case.kv_heads, case.block_size, case.head_size + case.head_size_v)
    page = math.prod(shape[1:])
    pages = torch.full((num_blocks, page + case.gap), NAN)[:, :page]
    physical = pages.unflatten(1, [shape[i] for i in case.layout[1:]])
    cache = physical.permute([case.layout.index(i) for i in range(4)])
    ids = iter((torch.randperm(num_blocks - 1) + 1).tolist())
    # Entries after a request's last block point to poisoned blocks.
    block_table = torch.zeros(len(lens), max(per_request) + 2, dtype=torch.int32)
    for row, (count, key, value) in enumerate(zip(per_request, keys, values, strict=True)):
        blocks = torch.tensor([next(ids) for _ in range(count)], dtype=torch.int32)
        block_table[row, :count] = blocks
        position = torch.arange(key.shape[0])
        slots = blocks[position // case.block_size].long() * case.block_size
        slots += position % case.block_size
        write_kv(cache, key, value, Rows(slots, case.block_size))
    return query, keys, values, cache, block_table


def make_rules(case):
    return Rules(
        scale=case.head_size**-0.5, head_size=case.head_size, window=case.window, **case.rules
    )


@pytest.mark.parametrize("scratch", [tiles_module.SCRATCH_BYTES, 4096], ids=["roomy", "tight"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case, scratch, monkeypatch):
    monkeypatch.setattr(tiles_module, "SCRATCH_BYTES", scratch)
    rules = make_rules(case)
    query, keys, values, cache, block_table = batch(case)
    output = torch.full((query.shape[0], case.heads, case.head_size_v), NAN)
    paged_attention(query, cache, output, make_tiles(case, rules, block_table), rules)
    want = expected(case, rules, query, keys, values)
    torch.testing.assert_close(output.double(), want, rtol=2e-5, atol=2e-5)


def test_upper_bound_on_lengths_is_enough():
    case = CASES["mixed"]
    rules = make_rules(case)
    query, keys, values, cache, block_table = batch(case)
    bounds = [new + cached + 5 for new, cached in case.requests]
    output = torch.full((query.shape[0], case.heads, case.head_size_v), NAN)
    paged_attention(query, cache, output, make_tiles(case, rules, block_table, bounds), rules)
    want = expected(case, rules, query, keys, values)
    torch.testing.assert_close(output.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_encoder_without_cache(window):
    case = Case([(5, 0), (1, 0), (33, 0), (32, 0)], window=window, rules={"causal": False})
    rules = make_rules(case)
    query, keys, values, _, block_table = batch(case)
    output = torch.full((query.shape[0], case.heads, case.head_size_v), NAN)
    tiles = make_tiles(case, rules, block_table)
    dense_attention(query, torch.cat(keys), torch.cat(values), output, tiles, rules)
    want = expected(case, rules, query, keys, values)
    torch.testing.assert_close(output.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rounds_once(dtype):
    case = CASES["mixed"]
    rules = make_rules(case)
    query, keys, values, cache, block_table = batch(case)
    query, cache = query.to(dtype), cache.to(dtype)
    output = torch.full((query.shape[0], case.heads, case.head_size_v), NAN, dtype=dtype)
    paged_attention(query, cache, output, make_tiles(case, rules, block_table), rules)
    keys, values = ([t.to(dtype).float() for t in side] for side in (keys, values))
    want = expected(case, rules, query.float(), keys, values)
    torch.testing.assert_close(output, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_layers_with_other_windows_share_tiles():
    case = CASES["mixed"]
    query, keys, values, cache, block_table = batch(case)
    tiles = make_tiles(case, make_rules(case), block_table)
    for window in (None, 4, 9):
        rules = Rules(scale=0.25, head_size=case.head_size, window=window)
        output = torch.full((query.shape[0], case.heads, case.head_size_v), NAN)
        paged_attention(query, cache, output, tiles, rules)
        want = expected(case, rules, query, keys, values)
        torch.testing.assert_close(output.double(), want, rtol=2e-5, atol=2e-5)


def test_windowed_layer_reads_nothing_older():
    """The cache manager reuses blocks outside the window for other requests."""
    case = Case([(1, 100), (3, 60)], window=8)
    rules = make_rules(case)
    query, keys, values, cache, block_table = batch(case)
    for row, (_, cached) in enumerate(case.requests):
        for block in range((cached - 8 + 1) // case.block_size):
            cache[block_table[row, block]] = NAN
            block_table[row, block] = 0
    output = torch.full((query.shape[0], case.heads, case.head_size_v), NAN)
    paged_attention(query, cache, output, make_tiles(case, rules, block_table), rules)
    want = expected(case, rules, query, keys, values)
    torch.testing.assert_close(output.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scratch", [tiles_module.SCRATCH_BYTES, 4096], ids=["roomy", "tight"])
@pytest.mark.parametrize("window", [None, 9])
def test_decode_tiles_know_no_lengths(window, scratch, monkeypatch):
    """The same work serves every batch of a size: lengths are read from the tensor alone, up to
    the longest that a request may become, and padding is 0 tokens long."""
    monkeypatch.setattr(tiles_module, "SCRATCH_BYTES", scratch)
    case = Case(DECODE, window=window)
    rules = make_rules(case)
    query, keys, values, cache, block_table = batch(case)
    padding = 3
    seq_lens = torch.tensor([new + cached for new, cached in case.requests] + [0] * padding)
    block_table = torch.cat((block_table, torch.zeros(padding, block_table.shape[1]).int()))
    query = torch.cat((query, torch.randn(padding, case.heads, case.head_size)))
    cache[0] = 1.0  # where padding tokens are written
    output = torch.full((len(query), case.heads, case.head_size_v), NAN)
    tiles = make_decode_tiles(
        seq_lens.int(),
        block_table,
        max_keys=block_table.shape[1] * case.block_size,
        kv_heads=case.kv_heads,
        content=case.head_size + case.head_size_v,
        window=window,
    )
    paged_attention(query, cache, output, tiles, rules)
    want = expected(case, rules, query[:-padding], keys, values)
    torch.testing.assert_close(output[:-padding].double(), want, rtol=2e-5, atol=2e-5)
    assert output[-padding:].isfinite().all(), "padding must not spread NaN"


def test_tiles_cover_every_row_once_within_scratch():
    query_lens, seq_lens = [8192, 1, 300, 2, 1], [9000, 100_000, 300, 5, 7]
    seen = []
    for plan in plan_tiles(query_lens, seq_lens, heads=14, kv_heads=2, content=128):
        scores = len(plan.requests) * plan.num_rows * plan.num_keys * 14 * 4
        assert scores <= tiles_module.SCRATCH_BYTES
        for r in plan.requests:
            last = min(plan.first_row + plan.num_rows, query_lens[r])
            seen += [(r, row) for row in range(plan.first_row, last)]
    assert sorted(seen) == [(r, i) for r, n in enumerate(query_lens) for i in range(n)]


def test_padding_tokens_go_to_the_null_block():
    cache = torch.full((4, 1, 2, 2), NAN)
    key = torch.arange(3.0).view(3, 1, 1)
    write_kv(cache, key, key + 10, Rows(torch.tensor([5, -1, 2, 7]), 2))
    rows = torch.stack(Rows(torch.tensor([[5, 2, 0]]), 2).indices)
    keys, values = read_kv(cache, 1, rows)
    assert keys.flatten().tolist() == [0.0, 2.0, 1.0]
    assert values.flatten().tolist() == [10.0, 12.0, 11.0]
    assert cache.isnan().sum() == cache.numel() - 6


def test_a_page_holds_the_keys_of_its_tokens_and_then_their_values():
    cache = torch.zeros(3, 2, 4, 6).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    write_kv(cache, key, value, Rows(torch.tensor([1 * 4 + 2]), 4))
    page = torch.zeros(2, 4, 2, 3)
    page[0, 2], page[1, 2] = 1, 2
    assert torch.equal(cache.transpose(1, 2).flatten(1)[1], page.flatten())
    both = halves(cache, 3)
    assert both.is_contiguous() and both.data_ptr() == cache.data_ptr()
    assert torch.equal(both[2:4], page)


def test_pages_without_two_alike_halves():
    assert halves(torch.zeros(3, 2, 4, 6), 2) is None
    assert halves(torch.zeros(6, 2, 4, 6)[::2], 3) is None
