# SPDX-License-Identifier: Apache-2.0
"""The switching proxy in daily use: two models behind one port."""

import asyncio
import json

import httpx
import pytest
from helpers.patience import patience, wait_for
from helpers.proxy import PROMPTS, Proxy, body, generated, text, url


def test_a_request_wakes_its_model_and_puts_the_other_to_sleep(pair, proxy):
    a, b = pair
    for server, other in ((a, b), (b, a), (a, b)):
        assert text(proxy.complete(server)) == server.texts[PROMPTS[0]]
        assert not server.is_sleeping() and other.is_sleeping()
        assert [s["state"] for s in proxy.status()] == [
            "awake" if s is server else "asleep" for s in pair
        ]
    assert proxy.metric("switches_total") == 3
    names = [model["id"] for model in proxy.users.get("/v1/models").json()["data"]]
    assert names == [a.model, b.model]


def test_streams_pass_through_as_they_come(pair, proxy):
    for server in pair:
        before = generated(server)
        long = body(server, tokens=450, stream=True, ignore_eos=True)
        with proxy.users.stream("POST", "/v1/completions", json=long) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            chunks = (line[6:] for line in answer.iter_lines() if line.startswith("data: {"))
            first = next(chunks)
            assert generated(server) - before < 450  # not all at the end
            texts = [json.loads(chunk)["choices"][0]["text"] for chunk in (first, *chunks)]
        assert len(texts) > 20
        assert "".join(texts).startswith(server.texts[PROMPTS[0]])


def test_admin_sleeps_and_wakes(pair, proxy):
    a, b = pair
    woken = proxy.admin.post("/wake", params={"model": b.model}).json()
    assert woken == {"url": url(b), "state": "awake"}
    assert not b.is_sleeping() and a.is_sleeping()
    assert proxy.admin.post("/sleep", params={"model": b.model}).json()["state"] == "asleep"
    assert b.is_sleeping()
    assert proxy.admin.post("/sleep", params={"model": "nobody"}).status_code == 404
    assert proxy.users.get("/status").status_code == 404


def test_clients_that_leave_hold_nothing_up(pair, proxy):
    a, b = pair
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    before = generated(a)
    long = body(a, tokens=450, stream=True, ignore_eos=True)
    with proxy.users.stream("POST", "/v1/completions", json=long) as answer:
        next(answer.iter_lines())
        # A client that waits for b and leaves before its turn.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{proxy.url}/v1/completions", json=body(b), timeout=0.2)
    wait_for(proxy.quiet)
    assert 0 < generated(a) - before < 450  # cut off
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]


def test_a_request_s_id_is_that_of_its_answer(pair, proxy):
    headers = {"X-Request-Id": "of-this-test"}
    answer = proxy.users.post("/v1/completions", json=body(pair[0]), headers=headers)
    assert answer.headers["x-request-id"] == "of-this-test"
    assert answer.json()["id"] == "cmpl-of-this-test"


def test_running_answers_end_before_their_model_sleeps(pair, proxy):
    a, b = pair
    before = generated(a)

    async def both() -> None:
        async with httpx.AsyncClient(base_url=proxy.url, timeout=120) as http:
            long = asyncio.create_task(
                http.post("/v1/completions", json=body(a, tokens=400, ignore_eos=True))
            )
            while proxy.status()[0]["in_flight"] == 0:
                assert not long.done()
                await asyncio.sleep(0.02)
            other = await http.post("/v1/completions", json=body(b))
            assert text(other) == b.texts[PROMPTS[0]]
            # Whether this process has read the first answer yet depends on the scheduler.
            assert generated(a) - before == 400
            assert (await long).json()["usage"]["completion_tokens"] == 400

    asyncio.run(both())


def test_turns_of_no_length_still_serve_both(pair):
    async def crowd(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            requests = [http.post("/v1/completions", json=body(s)) for s in pair for _ in range(4)]
            return [text(answer) for answer in await asyncio.gather(*requests)]

    with Proxy(pair, "--turn-s", "0") as proxy:
        expected = [server.texts[PROMPTS[0]] for server in pair for _ in range(4)]
        assert asyncio.run(crowd(proxy.url)) == expected
        assert proxy.metric("switches_total") <= 4


def test_a_full_queue_refuses_and_says_when_to_come_again(pair):
    a, b = pair

    async def crowd(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            requests = (http.post("/v1/completions", json=body(b)) for _ in range(12))
            return await asyncio.gather(*requests)

    with Proxy(pair, "--max-queue", "4") as proxy:
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
        answers = asyncio.run(crowd(proxy.url))
        refused = [answer for answer in answers if answer.status_code == 503]
        served = [text(answer) for answer in answers if answer.status_code != 503]
        assert len(refused) == 8 and len(served) == 4
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert set(served) == {b.texts[PROMPTS[0]]}


def test_an_idle_server_falls_asleep(pair):
    a, _ = pair
    with Proxy(pair, "--idle-s", str(2 * patience()), "--level", "2") as proxy:
        for _ in range(2):
            assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
            assert not a.is_sleeping()
            wait_for(a.is_sleeping, "the idle server sleeps", 60)
