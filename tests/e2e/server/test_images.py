# SPDX-License-Identifier: Apache-2.0
"""Requests with images over HTTP, as in the commands that vLLM publishes for sleep mode."""

import os

import pytest
from helpers.models import make_model
from helpers.server import MEMORY, SMALL, InBackground, Server
from helpers.vision import QUESTIONS, TOKENS, hf_answers, messages

LENGTH = ("--max-model-len", "2048")
OPTIONS = {
    "tiny-phi3v": ("--trust-remote-code", "--limit-mm-per-prompt", '{"image": 3}'),
    "tiny-qwen2.5-vl": ("--limit-mm-per-prompt", '{"image": 3, "video": 0}'),
}


@pytest.fixture(
    scope="module", params=[pytest.param("tiny-phi3v", marks=pytest.mark.slow), "tiny-qwen2.5-vl"]
)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"images-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
    }
    log = tmp_path_factory.mktemp("images") / "log"
    options = ("--enable-sleep-mode", "--dtype", "float32", *SMALL, *LENGTH, *MEMORY)
    with Server(model, *options, *OPTIONS[model.name], log=log, env=env) as server:
        yield server


def body(server, question) -> dict:
    chosen = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    return {"model": server.model, "messages": messages(question), **chosen}


def token_ids(answer) -> list[int]:
    return answer["choices"][0]["token_ids"]


def answers(server) -> list[list[int]]:
    bodies = [body(server, question) for question in QUESTIONS]
    return [token_ids(server.post("/v1/chat/completions", json=body)) for body in bodies]


def test_the_same_answers_about_images_before_sleep_and_after_each_level(server, model):
    expected = hf_answers(model)
    assert answers(server) == expected

    server.post("/sleep?level=1")
    assert server.is_sleeping()
    server.post("/wake_up")
    assert answers(server) == expected

    server.post("/sleep?level=2")
    server.post("/wake_up")
    server.post("/collective_rpc", json={"method": "reload_weights"})
    server.post("/reset_prefix_cache")
    assert answers(server) == expected


def test_an_image_that_comes_during_a_sleep_is_seen_after_it(server, model):
    answers(server)
    server.post("/sleep?level=1")
    waits = InBackground(server, "/v1/chat/completions", json=body(server, QUESTIONS[3]))
    assert not waits.is_done()
    server.post("/wake_up")
    answer = waits.answer()
    assert answer.status_code == 200, answer.text
    assert token_ids(answer.json()) == hf_answers(model)[3]
