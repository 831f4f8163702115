# SPDX-License-Identifier: Apache-2.0
"""Attention on latents: compared with the keys and values that they stand for, row by row."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vllm_sleep_ascend.native.attention import tiles as tiles_module
from vllm_sleep_ascend.native.attention.paged import Rules, latent_attention
from vllm_sleep_ascend.native.attention.tiles import (
    Kept,
    make_decode_tiles,
    make_tile,
    plan_tiles,
)

HEADS, RANK, ROPE, NOPE, VALUE = 4, 24, 8, 16, 12
SIZE, SCALE = RANK + ROPE, (NOPE + ROPE) ** -0.5
NAN = float("nan")

BATCHES = {
    "prompts": [(5, 0), (1, 0), (33, 0)],
    "decode steps": [(1, 7), (1, 0), (1, 40), (1, 15), (1, 16)],
    "mixed": [(1, 31), (20, 0), (7, 26), (1, 3), (3, 64), (0, 5), (50, 13)],
    "many alike": [(1, n) for n in range(70)],
}
"""New and cached tokens of each request."""


class Made:
    """A batch, and the matrices that make keys and values of latents."""

    def __init__(self, requests, block_size=16):
        torch.manual_seed(0)
        self.requests, self.block_size = requests, block_size
        rows = sum(new for new, _ in requests)
        self.nope, self.rope = torch.randn(rows, HEADS, NOPE), torch.randn(rows, HEADS, ROPE)
        self.to_keys = torch.randn(HEADS, NOPE, RANK) / RANK**0.5
        self.to_values = torch.randn(HEADS, RANK, VALUE) / RANK**0.5
        self.latents = [torch.randn(new + cached, SIZE) for new, cached in requests]

    def cache(self):
        """With NaN wherever no token is, and its blocks in no order."""
        size = self.block_size
        counts = [-(-len(latents) // size) for latents in self.latents]
        cache = torch.full((sum(counts) + 2, size, SIZE), NAN)
        table = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int32)
        ids = iter((torch.randperm(sum(counts)) + 1).tolist())
        for row, latents in enumerate(self.latents):
            for place, part in enumerate(latents.split(size)):
                table[row, place] = block = next(ids)
                cache[block, : len(part)] = part
        return cache, table

    def query(self):
        absorbed = torch.einsum("thp,hpr->thr", self.nope, self.to_keys)
        return torch.cat((absorbed, self.rope), -1)

    def tiles(self, table):
        new = [count for count, _ in self.requests]
        lengths = [count + cached for count, cached in self.requests]
        starts = torch.tensor([0, *new]).cumsum(0).int()
        plans = plan_tiles(new, lengths, heads=HEADS, kv_heads=1, content=SIZE, wide=SIZE)
        exact, kept = torch.tensor(lengths, dtype=torch.int32), Kept()
        return [make_tile(plan, new, starts, exact, table, kept=kept) for plan in plans]

    def expected(self):
        """Of heads with keys and values of their own, in float64."""
        rows, start = [], 0
        for (new, cached), latents in zip(self.requests, self.latents, strict=True):
            compressed, rotated = latents.double().split((RANK, ROPE), -1)
            keys = torch.einsum("kr,hpr->hkp", compressed, self.to_keys.double())
            keys = torch.cat((keys, rotated.expand(HEADS, -1, -1)), -1)
            values = torch.einsum("kr,hrv->hkv", compressed, self.to_values.double())
            query = torch.cat((self.nope, self.rope), -1)[start : start + new].double()
            for row, of_heads in enumerate(query):
                seen = cached + row + 1
                scores = torch.einsum("hd,hkd->hk", of_heads, keys[:, :seen]) * SCALE
                rows.append(torch.einsum("hk,hkv->hv", scores.softmax(-1), values[:, :seen]))
            start += new
        return torch.stack(rows)


def attended(made, cache, tiles, query):
    output = torch.full((len(query), HEADS, RANK), NAN)
    latent_attention(query, cache, output, tiles, Rules(scale=SCALE, head_size=SIZE))
    return torch.einsum("thr,hrv->thv", output, made.to_values)


@pytest.mark.parametrize("scratch", [tiles_module.SCRATCH_BYTES, 4096], ids=["roomy", "tight"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_latents_are_the_keys_and_values_of_all_heads(requests, block_size, scratch, monkeypatch):
    monkeypatch.setattr(tiles_module, "SCRATCH_BYTES", scratch)
    made = Made(requests, block_size)
    cache, table = made.cache()
    got = attended(made, cache, made.tiles(table), made.query())
    torch.testing.assert_close(got.double(), made.expected(), rtol=1e-4, atol=1e-5)


def kept_bytes(tiles):
    chunks = [chunk for tile in tiles for chunk in tile.chunks.values()]
    return sum(part.nbytes for chunk in chunks for part in chunk if part is not None)


def test_what_a_step_keeps_does_not_grow_with_its_context(monkeypatch):
    """Rows and masks of a long prompt; what is not kept is computed anew by each layer."""
    monkeypatch.setattr(tiles_module, "SCRATCH_BYTES", scratch := 1 << 20)
    made = Made([(512, 3584)])
    cache, table = made.cache()
    tiles = made.tiles(table)
    assert len(tiles) > 30
    everything = sum(tile.num_keys * (8 + tile.rows.shape[1]) for tile in tiles)
    for _ in range(2):
        got = attended(made, cache, tiles, made.query())
        torch.testing.assert_close(got.double(), made.expected(), rtol=1e-4, atol=1e-5)
        assert scratch / 2 < kept_bytes(tiles) <= scratch < everything / 2


def test_what_a_graph_keeps_does_not_grow_with_its_context(monkeypatch):
    monkeypatch.setattr(tiles_module, "SCRATCH_BYTES", scratch := 1 << 16)
    made = Made([(1, n) for n in range(9, 19)])
    cache, table = made.cache()
    cache[0] = 1.0
    table = torch.cat((table, table.new_zeros(10, 300)), 1)
    lengths = torch.tensor([new + cached for new, cached in made.requests])
    tiles = make_decode_tiles(lengths, table, max_keys=4096, kv_heads=1, content=SIZE)
    got = attended(made, cache, tiles, made.query())
    torch.testing.assert_close(got.double(), made.expected(), rtol=1e-4, atol=1e-5)
    assert scratch / 2 < kept_bytes(tiles) <= scratch < 8 * 10 * 4096


@pytest.mark.parametrize(("tokens", "context"), [(8192, 32768), (8192, 131072)])
def test_the_budget_of_a_step_holds_for_published_sizes(tokens, context):
    """All chunks of DeepSeek-V3's step with 16 heads would be several times as large."""
    kept, taken, all_bytes = Kept(), 0, 0
    plans = plan_tiles([tokens], [context], heads=16, kv_heads=1, content=576, wide=576)
    for plan in plans:
        size = plan.num_keys * (8 + plan.num_rows)
        all_bytes += size
        taken += size * kept.take(size)
    assert taken <= tiles_module.SCRATCH_BYTES < all_bytes / 5


class HostCopies(TorchFunctionMode):
    """Counts tensors that are made from lists of the host."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requests", [[(1, 31), (1, 2), (200, 1000)], [(9, 9), *[(1, 30)] * 5]])
def test_requests_side_by_side_are_sliced(requests, monkeypatch):
    """A prompt after decode steps has many tiles; a host copy for each would stall the device."""
    monkeypatch.setattr(tiles_module, "SCRATCH_BYTES", 1 << 16)
    made = Made(requests)
    cache, table = made.cache()
    starts = torch.tensor([0, *(new for new, _ in requests)]).cumsum(0).int()
    lengths = [new + cached for new, cached in requests]
    exact, new = torch.tensor(lengths, dtype=torch.int32), [new for new, _ in requests]
    plans = list(plan_tiles(new, lengths, heads=HEADS, kv_heads=1, content=SIZE, wide=SIZE))
    assert any(plan.requests[0] > 0 for plan in plans)
    with HostCopies() as copies:
        tiles = [make_tile(plan, new, starts, exact, table) for plan in plans]
    assert copies.count == 0
    got = attended(made, cache, tiles, made.query())
    torch.testing.assert_close(got.double(), made.expected(), rtol=1e-4, atol=1e-5)


def test_tiles_of_a_graph():
    made = Made(BATCHES["decode steps"])
    cache, table = made.cache()
    cache[0] = 1.0  # where padding is written
    lengths = [new + cached for new, cached in made.requests]
    table = torch.cat((table, torch.zeros(2, table.shape[1], dtype=torch.int32)))
    tiles = make_decode_tiles(
        torch.tensor([*lengths, 0, 0]), table, max_keys=64, kv_heads=1, content=SIZE
    )
    query = torch.cat((made.query(), torch.randn(2, HEADS, SIZE)))
    got = attended(made, cache, tiles, query)
    torch.testing.assert_close(got[:-2].double(), made.expected(), rtol=1e-4, atol=1e-5)
    assert got.isfinite().all()


def test_queries_that_are_wider_than_their_scores_are_bounded_too():
    heads, wide = 128, 576
    most = tiles_module.SCRATCH_BYTES // (4 * heads)
    query_lens, seq_lens = [8192, *[1] * 500], [8192, *[20] * 500]
    rows = 0
    for plan in plan_tiles(query_lens, seq_lens, heads=heads, kv_heads=1, content=wide, wide=wide):
        rows += sum(min(plan.num_rows, query_lens[r] - plan.first_row) for r in plan.requests)
        assert len(plan.requests) * plan.num_rows * max(plan.num_keys, wide) <= most
    assert rows == 8192 + 500


def test_wide_queries_of_a_graph_are_bounded_too():
    heads, wide = 128, 576
    tiles = make_decode_tiles(
        torch.ones(300, dtype=torch.int32),
        torch.zeros(300, 1, dtype=torch.int32),
        max_keys=64,
        kv_heads=1,
        content=wide,
        wide=heads * wide,
    )
    sizes = [len(tile.rows) for tile in tiles]
    assert sum(sizes) == 300
    assert max(sizes) * heads * wide * 4 <= tiles_module.SCRATCH_BYTES


def test_a_step_stores_its_latents():
    from vllm_sleep_ascend.native.attention.mla import NPUMLAImpl

    impl = NPUMLAImpl(HEADS, SIZE, SCALE, kv_lora_rank=RANK)
    cache = torch.full((4, 2, SIZE), NAN)
    compressed, rotated = torch.randn(3, RANK), torch.randn(3, 1, ROPE)
    slots = torch.tensor([5, -1, 2, 7])  # of more tokens than there are
    impl.do_kv_cache_update(compressed, rotated, cache, slots, "auto", torch.ones(()))
    for slot, token in ((5, 0), (2, 2), (0, 1)):
        stored = cache.view(-1, SIZE)[slot]
        assert torch.equal(stored, torch.cat((compressed[token], rotated[token, 0])))
    assert cache.isnan().sum() == cache.numel() - 3 * SIZE


def test_a_sliding_window_is_refused():
    from vllm_sleep_ascend.native.attention.mla import NPUMLAImpl

    with pytest.raises(NotImplementedError, match="sliding window in multi-head latent attention"):
        NPUMLAImpl(HEADS, SIZE, SCALE, kv_lora_rank=RANK, sliding_window=16)
