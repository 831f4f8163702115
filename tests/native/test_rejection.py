# SPDX-License-Identifier: Apache-2.0
"""The rejection sampler's kernels compared with loops over requests and tokens."""

import pytest
import torch

from vllm_sleep_ascend.native import rejection

VOCAB = 11
COUNTS = [[3, 0, 1, 2], [0, 0], [4], [1, 1, 1, 1, 1]]


def batch(counts, seed):
    torch.manual_seed(seed)
    tokens = sum(counts)
    target = torch.rand(tokens, VOCAB).softmax(-1)
    draft_probs = torch.rand(tokens, VOCAB).softmax(-1)
    drafts = torch.randint(0, VOCAB, (tokens,), dtype=torch.int32)
    agree = torch.rand(tokens) < 0.6
    drafts = torch.where(agree, target.argmax(-1).int(), drafts)
    drafts[torch.rand(tokens) < 0.1] = -1
    return {
        "totals": torch.tensor(counts).cumsum(0).int(),
        "drafts": drafts,
        "target": target,
        "draft_probs": draft_probs,
        "recovered": torch.randint(0, VOCAB, (tokens,), dtype=torch.int32),
        "bonus": torch.randint(0, VOCAB, (len(counts), 1), dtype=torch.int32),
        "uniform": torch.rand(tokens, dtype=torch.float64),
        "greedy": torch.rand(len(counts)) < 0.5,
    }


def walk(counts, width, wanted, accept, replace, drafts, bonus):
    out = torch.full((len(counts), width + 1), -1, dtype=torch.int32)
    start = 0
    for r, count in enumerate(counts):
        if wanted[r]:
            for place in range(count):
                if not accept(start + place, place):
                    out[r, place] = replace[start + place]
                    break
                out[r, place] = drafts[start + place]
            else:
                out[r, count] = bonus[r]
        start += count
    return out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("all_greedy", [False, True])
def test_greedy(counts, seed, synthetic, all_greedy):
    b, width = batch(counts, seed), max(counts)
    rates = torch.tensor([0.9, 0.5, 0.3, 0.1]) if synthetic else None
    best = b["target"].argmax(-1)

    def accept(t, place):
        if synthetic:
            return b["uniform"][t] < rates[place] and b["drafts"][t] >= 0
        return b["drafts"][t] == best[t]

    out = torch.full((len(counts), width + 1), -1, dtype=torch.int32)
    greedy = None if all_greedy else b["greedy"]
    rejection.rejection_greedy_sample(
        out,
        b["totals"],
        b["drafts"],
        best,
        b["bonus"],
        greedy,
        width,
        b["uniform"],
        rates,
        synthetic,
    )
    wanted = [True] * len(counts) if all_greedy else b["greedy"].tolist()
    want = walk(counts, width, wanted, accept, best, b["drafts"], b["bonus"])
    assert out.tolist() == want.tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", ["draft probabilities", "none", "synthetic"])
def test_random(counts, seed, mode):
    b, width = batch(counts, seed), max(counts)
    rates = torch.tensor([0.9, 0.5, 0.3, 0.1]) if mode == "synthetic" else None
    draft_probs = b["draft_probs"] if mode == "draft probabilities" else None

    def accept(t, place):
        token = int(b["drafts"][t])
        if token < 0:
            return False
        if mode == "synthetic":
            return b["uniform"][t] < rates[place]
        draft = 1.0 if draft_probs is None else draft_probs[t, token]
        return draft > 0 and b["target"][t, token] / draft >= b["uniform"][t]

    out = torch.full((len(counts), width + 1), -1, dtype=torch.int32)
    rejection.rejection_random_sample(
        out,
        b["totals"],
        b["drafts"],
        draft_probs,
        b["target"],
        b["bonus"],
        b["recovered"],
        b["uniform"],
        b["greedy"],
        width,
        VOCAB,
        rates,
        draft_probs is None,
        rates is not None,
    )
    wanted = (~b["greedy"]).tolist()
    want = walk(counts, width, wanted, accept, b["recovered"], b["drafts"], b["bonus"])
    assert out.tolist() == want.tolist()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("with_draft", [False, True])
def test_recovered(counts, with_draft):
    b = batch(counts, 0)
    noise = torch.rand(len(counts), VOCAB)
    out = torch.zeros_like(b["drafts"])
    draft_probs = b["draft_probs"] if with_draft else None
    rejection.sample_recovered_tokens(
        out,
        b["totals"],
        b["drafts"],
        draft_probs,
        b["target"],
        noise,
        VOCAB,
        8192,
        not with_draft,
        False,
    )
    requests = [r for r, count in enumerate(counts) for _ in range(count)]
    for t, r in enumerate(requests):
        if with_draft:
            left = (b["target"][t] - draft_probs[t]).clamp(min=0)
        else:
            left = b["target"][t].clone()
            if b["drafts"][t] >= 0:
                left[b["drafts"][t]] = 0
            elif int(out[t]) != int((left * noise[r]).argmax()):
                continue
        assert int(out[t]) == int((left * noise[r]).argmax())


@pytest.mark.parametrize("counts", COUNTS)
def test_expand(counts):
    values = torch.tensor([0.5, 0.0, 2.0, 3.0, 4.0])[: len(counts)]
    out = torch.empty(sum(counts))
    rejection.expand(out, values, torch.tensor(counts).cumsum(0).int(), 0, 1, 128)
    want = [v or 1.0 for v, n in zip(values.tolist(), counts, strict=True) for _ in range(n)]
    assert out.tolist() == want
