# SPDX-License-Identifier: Apache-2.0
"""Embedding models: vectors equal Hugging Face's before and after sleep, offline and over HTTP."""

import os

import pytest
import torch
from helpers.engine import engine, sleep_and_wake
from helpers.reference import PROMPTS, tokenizer
from helpers.server import HBM_GIB, MEMORY, SMALL, Server
from transformers import AutoModel

SOME = list(PROMPTS[:7])


@pytest.fixture(scope="module")
def expected(tiny_model):
    """The last token's hidden state, normalised."""
    network = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    vectors = []
    for prompt in SOME:
        ids = tokenizer(tiny_model)(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            vectors.append(network(ids).last_hidden_state[0, -1])
    vectors = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
    assert (vectors @ vectors.T - torch.eye(len(SOME))).abs().max() < 0.9, "prompts look alike"
    return vectors


def test_offline(tiny_model, expected):
    def embed():
        return torch.tensor([o.outputs.embedding for o in llm.embed(SOME, use_tqdm=False)])

    with engine(tiny_model, runner="pooling", convert="embed", enable_sleep_mode=True) as llm:
        torch.testing.assert_close(embed(), expected, rtol=0, atol=1e-5)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            torch.testing.assert_close(embed(), expected, rtol=0, atol=1e-5)


def test_an_encoder_without_a_kv_cache(tiny_model, tmp_path):
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"encoder-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
    }
    options = ("--runner", "pooling", "--convert", "embed", "--enable-sleep-mode", *SMALL, *MEMORY)
    encoder = ("--hf-overrides", '{"is_causal": false}', "--max-num-batched-tokens", "512")
    with Server(tiny_model, *options, *encoder, log=tmp_path / "log", env=env) as server:

        def embed():
            body = {"model": server.model, "input": SOME}
            return [one["embedding"] for one in server.post("/v1/embeddings", json=body)["data"]]

        def state():
            return server.http.get("/sleep_status").json()["state"]

        before = embed()
        assert state() == "awake"
        assert "kv_cache" not in server.rank_status()["tags"]
        server.post("/sleep")
        assert (state(), server.is_sleeping()) == ("asleep", True)
        assert server.post("/wake_up")["status"] == "awake"
        assert (state(), embed()) == ("awake", before)


def test_over_http(tiny_model, expected, tmp_path):
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"embeddings-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
    }
    options = ("--runner", "pooling", "--convert", "embed", "--dtype", "float32")
    options += ("--enable-sleep-mode", *SMALL, *MEMORY)
    with Server(tiny_model, *options, log=tmp_path / "log", env=env) as server:

        def embed():
            body = {"model": server.model, "input": SOME}
            data = server.post("/v1/embeddings", json=body)["data"]
            return torch.tensor([one["embedding"] for one in data])

        torch.testing.assert_close(embed(), expected, rtol=0, atol=1e-5)
        for level in (1, 2):
            server.post(f"/sleep?level={level}")
            assert server.is_sleeping()
            server.post("/wake_up?tags=weights")
            if level == 2:
                server.post("/collective_rpc", json={"method": "reload_weights"})
            server.post("/wake_up?tags=kv_cache")
            torch.testing.assert_close(embed(), expected, rtol=0, atol=1e-5)
