# SPDX-License-Identifier: Apache-2.0
"""torch_npu's own operators, compared with the formulas in its documentation."""

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch_npu.op_plugin.atb._atb_ops import _register_atb_extensions

_register_atb_extensions()

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def device():
    """torch caches freed memory. Operators are called in the same way as by an engine."""
    with torch.inference_mode():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms(dtype):
    x, other = random(3, 5, 16, dtype=dtype), random(3, 5, 16, dtype=dtype)
    gamma = random(16, dtype=dtype)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-5)
    expected = F.rms_norm(x.float(), (16,), gamma.float(), 1e-5)
    assert y.dtype == dtype and rstd.dtype == torch.float32
    close(y.cpu(), expected.to(dtype))
    close(rstd.cpu(), (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    y, _, total = torch_npu.npu_add_rms_norm(x.npu(), other.npu(), gamma.npu(), 1e-5)
    assert torch.equal(total.cpu(), x + other)
    close(y.cpu(), F.rms_norm((x + other).float(), (16,), gamma.float(), 1e-5).to(dtype))


def test_swiglu():
    x = random(3, 8, 6)
    a, b = x.float().chunk(2, -1)
    close(torch_npu.npu_swiglu(x.npu()).cpu(), (F.silu(a) * b).half())
    a, b = x.float().chunk(2, 1)
    close(torch_npu.npu_swiglu(x.npu(), dim=1).cpu(), (F.silu(a) * b).half())


@pytest.mark.parametrize("neox", [True, False])
def test_rotary_embedding(neox):
    """As complex numbers: each pair is rotated by its angle; the rest of a head is unchanged."""
    size, rotated = 8, 6
    angles = random(20, rotated // 2, dtype=torch.float32)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.tensor([3, 0, 19])
    query, key = random(3, 4 * size, dtype=torch.float32), random(3, 2 * size, dtype=torch.float32)
    expected = []
    for tensor in (query, key):
        heads = tensor.view(3, -1, size)[..., :rotated]
        pairs = heads.unflatten(-1, (2, -1)).mT if neox else heads.unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(pairs.contiguous())
        turned = torch.view_as_real(turned * torch.exp(1j * angles[positions]).unsqueeze(1))
        whole = tensor.view(3, -1, size).clone()
        whole[..., :rotated] = (turned.mT if neox else turned).flatten(-2)
        expected.append(whole.view_as(tensor))
    query, key = query.npu(), key.npu()
    torch_npu._npu_rotary_embedding(positions.npu(), query, key, size, table.npu(), neox)
    close(query.cpu(), expected[0])
    close(key.cpu(), expected[1])


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mrope_without_sections_rotates_as_the_rotary_embedding(neox, dtype):
    """And leaves its arguments alone. Query and key may be parts of wider rows."""
    size, rotated = 64, 32
    angles = random(20, rotated // 2, dtype=torch.float32)
    table = torch.cat([angles.cos(), angles.sin()], -1).to(dtype).npu()
    positions = torch.tensor([3, 0, 19]).npu()
    rows = random(3, 6 * size, dtype=dtype).npu()
    query, key = rows[:, : 4 * size], rows[:, 4 * size :]
    turned = query.contiguous(), key.contiguous()
    torch_npu._npu_rotary_embedding(positions, *turned, size, table, neox)
    mode = "half" if neox else "interleave"
    got = torch_npu.npu_mrope(positions, query, key, table, size, rotary_mode=mode)
    for ours, theirs in zip(got, turned, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu()) and ours.is_contiguous()
    assert torch.equal(rows.cpu(), random(3, 6 * size, dtype=dtype))


@pytest.mark.parametrize(
    "change,problem",
    [
        ({"mrope_section": [16, 8, 8]}, "mrope_section .* not simulated"),
        ({"cache_mode": "interleave"}, "cache_mode interleave"),
        ({"rotary_mode": "interleaved"}, "rotary_mode interleaved"),
        ({"positions": torch.zeros(3, 2, dtype=torch.long)}, "positions of 2 dimensions"),
        ({"positions": torch.zeros(2)}, "positions torch.float32"),
        ({"query": torch.zeros(2, 2, 32).half()}, "not of 2 dimensions"),
        ({"key": torch.zeros(2, 32)}, "types differ"),
        ({"head_size": 16}, "32 of 16 elements"),
        ({"cos_sin_cache": torch.zeros(4, 16).half()}, "16 of 32 elements"),
    ],
)
def test_mrope_refuses(change, problem):
    arguments = {
        "positions": torch.zeros(2, dtype=torch.long),
        "query": torch.zeros(2, 64).half(),
        "key": torch.zeros(2, 32).half(),
        "cos_sin_cache": torch.zeros(4, 32).half(),
        "head_size": 32,
        "mrope_section": [0, 0, 0],
        **change,
    }
    on_device = {
        name: value.npu() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises(RuntimeError, match=problem):
        torch_npu.npu_mrope(**on_device)


def test_a_310p_has_neither_swiglu_nor_mrope(monkeypatch):
    monkeypatch.setenv("NPU_SIM_SOC", "310P")
    x, positions = torch.zeros(2, 32).npu(), torch.zeros(2, dtype=torch.long).npu()
    for operation in (
        lambda: torch_npu.npu_swiglu(x),
        lambda: torch_npu.npu_mrope(positions, x, x, x, 32),
    ):
        with pytest.raises(RuntimeError, match="not supported on 310P"):
            operation()


def test_norms_and_swiglu_refuse():
    x, gamma = random(3, 16).npu(), random(16).npu()
    for operation, problem in (
        (lambda: torch_npu.npu_rms_norm(x[0], gamma), "input of 1 dimensions"),
        (lambda: torch_npu.npu_rms_norm(x.float(), gamma), "float32 and gamma torch.float16"),
        (lambda: torch_npu.npu_add_rms_norm(x, x, gamma.float()), "gamma torch.float32"),
        (lambda: torch_npu.npu_add_rms_norm(x[:0], x[:0], gamma), "empty"),
        (lambda: torch_npu.npu_swiglu(x[:, :8]), "not contiguous"),
        (lambda: torch_npu.npu_swiglu(x[:0]), "empty"),
        (lambda: torch_npu.npu_rms_norm(x, gamma[:8]), "gamma .* for the last dimensions"),
        (lambda: torch_npu.npu_add_rms_norm(x, x, gamma[:8]), "gamma .* for the last dimensions"),
        (lambda: torch_npu.npu_add_rms_norm(x, x[:1], gamma), "x1 .* and x2"),
    ):
        with pytest.raises(RuntimeError, match=problem):
            operation()


def test_matmul_add():
    x, weight, total = random(2, 4), random(2, 3), random(4, 3, dtype=torch.float32)
    on_device = total.npu()
    torch_npu._npu_matmul_add_fp32(x.npu(), weight.npu(), on_device)
    close(on_device.cpu(), total + x.float().T @ weight.float())


def attend(query, key, value, visible):
    """Attention of a whole sequence, (tokens, heads, size)."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.float().repeat_interleave(group, 1).transpose(0, 1) for t in (key, value))
    q = query.float().transpose(0, 1)
    return F.scaled_dot_product_attention(q, key, value, visible, scale=0.3).transpose(0, 1)


QUERIES, KEYS, SIZE, BLOCK = (5, 1, 3), (5, 33, 32), 64, 16
"""Of three sequences: one from its start, one by a token, one in the middle."""
MASK = torch.ones(2048, 2048).triu(1).to(torch.int8)


@pytest.fixture
def batch():
    """Keys and values as tokens, and the same in permuted blocks."""
    query = random(9, 4, SIZE)
    key, value = random(sum(KEYS), 2, SIZE), random(sum(KEYS) + 1, 2, SIZE)[1:]
    table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int().view(3, 4)
    blocks = torch.zeros(2, 12, BLOCK, 2, SIZE, dtype=torch.float16).npu()
    starts = [0, 5, 38]
    slots = torch.cat(
        [table[row].long().mul(BLOCK)[torch.arange(n) // BLOCK] + torch.arange(n) % BLOCK
         for row, n in enumerate(KEYS)]
    )  # fmt: skip
    padding = torch.tensor([-1, -1])
    torch_npu._npu_reshape_and_cache(
        F.pad(key, (0, 0, 0, 0, 0, 2), value=9.0).npu(),
        F.pad(value, (0, 0, 0, 0, 0, 2), value=9.0).npu(),
        blocks[0],
        blocks[1],
        torch.cat([slots, padding]).int().npu(),
    )
    assert not (blocks == 9.0).any()
    return query, key, value, starts, blocks.flatten(3), table


@pytest.mark.parametrize("band", [None, 2])
def test_paged_attention(batch, band):
    query, key, value, starts, blocks, table = batch
    out, lse = torch_npu.npu_fused_infer_attention_score(
        query.npu(),
        blocks[0],
        blocks[1],
        atten_mask=MASK.npu(),
        block_table=table.npu(),
        input_layout="TND",
        block_size=BLOCK,
        actual_seq_lengths=[5, 6, 9],
        actual_seq_lengths_kv=list(KEYS),
        num_key_value_heads=2,
        num_heads=4,
        scale=0.3,
        sparse_mode=3 if band is None else 4,
        **({} if band is None else {"pre_tokens": band, "next_tokens": 0}),
    )
    assert lse.shape == (1,)
    first = 0
    for q, k, start in zip(QUERIES, KEYS, starts, strict=True):
        visible = torch.ones(q, k, dtype=torch.bool).tril(k - q)
        if band is not None:
            visible &= ~torch.ones(q, k, dtype=torch.bool).tril(k - q - band - 1)
        tokens = slice(start, start + k)
        expected = attend(query[first : first + q], key[tokens], value[tokens], visible)
        close(out[first : first + q].cpu(), expected.half(), atol=2e-3, rtol=2e-3)
        first += q


@pytest.mark.parametrize("size", [16, 80, 512])
def test_paged_attention_of_one_row_each(size):
    """Layout BSH, in which heads may have other sizes; the sparse mode means nothing."""
    query, cache = random(3, 1, 4 * size), random(2, 7, BLOCK, 2 * size)
    table = torch.tensor([[6, 0, 0], [5, 3, 0], [1, 4, 2]], dtype=torch.int32)
    lengths = [BLOCK, BLOCK + 1, 3 * BLOCK]
    out, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), *cache.npu(), block_table=table.npu(), input_layout="BSH", block_size=BLOCK,
        actual_seq_lengths_kv=lengths, num_heads=4, num_key_value_heads=2, scale=0.3, sparse_mode=3,
    )  # fmt: skip
    assert out.shape == query.shape
    for row, length in enumerate(lengths):
        key, value = (side[table[row].long()].flatten(0, 1)[:length] for side in cache)
        tokens = (t.view(-1, t.shape[-1] // size, size) for t in (query[row], key, value))
        expected = attend(*tokens, None).flatten(1)
        close(out[row].cpu(), expected.half(), atol=2e-3, rtol=2e-3)


def test_attention_over_the_tokens_at_hand():
    query, key, value = random(9, 4, SIZE), random(9, 2, SIZE), random(9, 2, SIZE) + 1
    out, lse = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), input_layout="TND", num_heads=4,
        num_key_value_heads=2, scale=0.3, actual_seq_lengths=[4, 9], actual_seq_lengths_kv=[4, 9],
        softmax_lse_flag=True,
    )  # fmt: skip
    for part in (slice(0, 4), slice(4, 9)):
        expected = attend(query[part], key[part], value[part], None)
        close(out[part].cpu(), expected.half(), atol=2e-3, rtol=2e-3)
    scores = torch.einsum(
        "thd,shd->ths", query[:4].float(), key[:4].float().repeat_interleave(2, 1)
    )
    close(lse[:4, :, 0].cpu(), (scores * 0.3).logsumexp(-1))


@pytest.mark.parametrize(
    "change,problem",
    [
        ({"sparse_mode": 3}, "sparse_mode 3 needs a mask of 2048 x 2048"),
        ({"sparse_mode": 3, "atten_mask": MASK.T.contiguous()}, "the mask does not hide"),
        ({"input_layout": "BSND"}, "input_layout BSND is not simulated"),
        ({"input_layout": "BSH"}, "BSH with 2 rows"),
        ({"actual_seq_lengths": [8]}, "the last sequence does not end the query"),
        ({"actual_seq_lengths": [9, 8, 9]}, "ends that do not ascend"),
        ({"actual_seq_lengths": None}, "layout TND needs actual_seq_lengths"),
        ({"actual_seq_lengths_kv": None}, "there is no actual_seq_lengths_kv"),
        ({"actual_seq_lengths_kv": [4, 9]}, "batch sizes differ"),
        ({"actual_seq_lengths": [9] * 4097}, "4097 sequences, not 1 to 4096"),
        ({"num_heads": 4}, "2 heads, not 4"),
        ({"num_key_value_heads": 3}, "2 heads over 3 heads of keys"),
        ({"query": torch.zeros(9, 130, 64).half(), "num_heads": 130, "num_key_value_heads": 2},
         "130 heads over 2 of keys"),
        ({"query": torch.zeros(9, 2, 32).half()}, "TND with heads of 32, not 64, 128, 192"),
        ({"query": torch.zeros(9, 4, 64).half()[:, ::2]}, "query is not contiguous"),
        ({"value": torch.zeros(9, 2, 32).half()}, "key .* and value"),
        ({"quant_scale1": torch.ones(1)}, "quant_scale1 is not simulated"),
    ],
)  # fmt: skip
def test_attention_refuses(change, problem):
    q = random(9, 2, SIZE)
    arguments = {
        "query": q,
        "key": q,
        "value": q,
        "input_layout": "TND",
        "num_heads": 2,
        "actual_seq_lengths": [9],
        "actual_seq_lengths_kv": [9],
        **change,
    }
    refused(torch_npu.npu_fused_infer_attention_score, arguments, problem)


def refused(operator, arguments, problem):
    """Strides are kept on the way to the device."""
    on_device = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="npu").copy_(t)
        if isinstance(t, torch.Tensor)
        else t
        for name, t in arguments.items()
    }
    with pytest.raises(RuntimeError, match=problem):
        operator(**on_device)


TABLE = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    "change,problem",
    [
        ({"block_size": 32}, "blocks of 16, not 32"),
        ({"block_size": 8}, "blocks of 8, not a multiple of 16 of 1024"),
        ({"block_size": 1040}, "blocks of 1040, not a multiple of 16 of 1024"),
        ({"input_layout": "BSH", "query": torch.zeros(2, 1, 128).half(), "block_size": 528},
         "blocks of 528, not a multiple of 16 of 512"),
        ({"input_layout": "BSH", "query": torch.zeros(2, 1, 40).half()}, "heads of 20, not"),
        ({"input_layout": "BSH", "query": torch.zeros(2, 1, 1056).half()}, "heads of 528, not"),
        ({"input_layout": "BSH", "query": torch.zeros(2, 1, 128).half(), "block_table": None},
         "BSH without a block_table"),
        ({"input_layout": "BSH", "query": torch.zeros(2, 1, 128).half(), "atten_mask": MASK},
         "a mask with layout BSH"),
        ({"block_table": TABLE.long()}, r"block_table is torch\.int64"),
        ({"block_table": TABLE[0]}, "block_table has 1 dimensions"),
        ({"block_table": TABLE[:1]}, "1 rows of blocks, 2 sequences"),
        ({"actual_seq_lengths_kv": [33, 1]}, "3 blocks in 2 columns"),
        ({"actual_seq_lengths_kv": [32, 32], "key": torch.zeros(3, 16, 128).half(),
          "value": torch.zeros(3, 16, 128).half()}, "4 blocks in use, of 3"),
    ],
)  # fmt: skip
def test_paged_attention_refuses(change, problem):
    arguments = {
        "query": random(2, 2, SIZE),
        "key": random(4, 16, 2 * SIZE),
        "value": random(4, 16, 2 * SIZE),
        "block_table": TABLE,
        "block_size": 16,
        "input_layout": "TND",
        "num_heads": 2,
        "actual_seq_lengths": [1, 2],
        "actual_seq_lengths_kv": [17, 1],
        **change,
    }
    refused(torch_npu.npu_fused_infer_attention_score, arguments, problem)


@pytest.mark.parametrize(
    "change,problem",
    [
        ({"slot_indices": torch.tensor([3])}, r"slot_indices torch\.int64"),
        ({"key_cache": torch.zeros(2, 4, 16, 8).half().transpose(1, 2)}, "not contiguous"),
        ({"value_cache": torch.zeros(2, 16, 4, 8)}, r"torch\.float16 into torch\.float32"),
    ],
)
def test_the_cache_write_refuses(change, problem):
    arguments = {
        "key": random(1, 4, 8),
        "value": random(1, 4, 8),
        "key_cache": torch.zeros(2, 16, 4, 8).half(),
        "value_cache": torch.zeros(2, 16, 4, 8).half(),
        "slot_indices": torch.tensor([3], dtype=torch.int32),
        **change,
    }
    refused(torch_npu._npu_reshape_and_cache, arguments, problem)


def test_attention_knows_no_float32(monkeypatch):
    from vllm_sleep_ascend.sim.npu import attention

    monkeypatch.delenv("NPU_SIM_LAX_ATTENTION", raising=False)
    attention._is_lax.cache_clear()
    q = random(3, 2, SIZE, dtype=torch.float32).npu()
    with pytest.raises(RuntimeError, match=r"query is torch\.float32"):
        torch_npu.npu_fused_infer_attention_score(
            q, q, q, input_layout="TND", num_heads=2, actual_seq_lengths=[3],
            actual_seq_lengths_kv=[3],
        )  # fmt: skip
    attention._is_lax.cache_clear()


def test_experts():
    """Routing, the experts' products and unpermuting, compared with a loop over tokens."""
    tokens, choices, experts = 6, 2, 4
    x, weight = random(tokens, 8), random(experts, 8, 5)
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1], [1, 3]], dtype=torch.int32)
    probs = random(tokens, choices).abs()
    rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), chosen.npu(), active_num=tokens * choices, expert_num=experts,
        expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, experts],
    )  # fmt: skip
    assert counts.tolist() == [4, 4, 0, 4] and counts.dtype == torch.int64
    [products] = torch_npu.npu_grouped_matmul(
        [rows], [weight.npu()], group_list=counts, group_list_type=1, group_type=0, split_item=2
    )
    out = torch_npu.npu_moe_token_unpermute(products, index, probs.npu())
    picked = torch.einsum("th,tkho->tko", x.float(), weight[chosen.long()].float())
    close(out.cpu(), (picked.half().float() * probs.float().unsqueeze(-1)).sum(1).half())


def test_experts_elsewhere():
    x, chosen = random(2, 3), torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), chosen.npu(), active_num=4, expert_num=3, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, active_expert_range=[1, 3],
    )  # fmt: skip
    assert counts.tolist() == [1, 2]
    assert index.tolist() == [-1, 1, 0, 2]
    assert torch.equal(rows[:3].cpu(), x[[1, 0, 1]])


def test_a_product_of_unlike_shapes_is_refused():
    with pytest.raises(RuntimeError, match=r"rows \(2, 8\) and weight \(1, 5, 8\) for 1 groups"):
        torch_npu.npu_grouped_matmul(
            [random(2, 8).npu()], [random(1, 5, 8).npu()], group_list=torch.tensor([2]).npu(),
            group_type=0, group_list_type=1, split_item=2,
        )  # fmt: skip


def test_what_is_not_simulated_in_atb_is_refused():
    with pytest.raises(RuntimeError):
        torch_npu._npu_group_topk(random(4, 8).npu(), k=1, group_num=2, n=1)
        torch.npu.synchronize()
