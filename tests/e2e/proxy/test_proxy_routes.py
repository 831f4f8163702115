# SPDX-License-Identifier: Apache-2.0
"""Each route of vLLM's server through the proxy: the same answer as from the server itself."""

import pytest
from helpers.patience import wait_for
from helpers.proxy import Proxy, body, text

from vllm_sleep_ascend import routes
from vllm_sleep_ascend.routes import Needs

from .conftest import API_KEY

# Of those that take no steps; the others need more of a request, or another model.
SERVED = {
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/chat/completions/render"),
    *("/v1/completions/render", "/v1/messages/render", "/v1/responses/render"),
}
MESSAGES = [{"role": "user", "content": "Hi"}]
FORM = {"files": {"file": ("sound.wav", b"RIFF", "audio/wav")}}
# What differs between two answers to one request.
OF_ONE_ANSWER = {"id", "created", "created_at", "request_id", "completed_at", "response_id"}


def alike(answer) -> object:
    """Status and content of an answer, without what is new in each."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if key not in OF_ONE_ANSWER}
        return [strip(each) for each in value] if isinstance(value, list) else value

    assert answer.headers["content-type"].startswith("application/json"), answer.text
    return answer.status_code, strip(answer.json())


def awake(proxy, server) -> None:
    text(proxy.complete(server))


def texts(response: dict) -> list[str]:
    return [part["text"] for each in response["output"] for part in each["content"]]


def asked(server, path: str) -> dict:
    """A request that this path understands, if the server has it."""
    model = {"model": server.model}
    if "derender" in path or path == "/inference/v1/generate":
        return model
    if path == "/v1/responses" or path == "/v1/responses/render":
        return {**model, "input": "Hi", "max_output_tokens": 4, "temperature": 0}
    if "chat" in path or "messages" in path:
        return {**model, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    if path == "/detokenize":
        return {**model, "tokens": [1, 2]}
    return body(server, "Hi", 4)


def test_the_server_has_no_route_that_the_table_lacks(pair):
    described = pair[0].http.get("/openapi.json").json()["paths"]
    found = {f"{method.upper()} {path}" for path, on in described.items() for method in on}
    assert found - set(routes.ROUTES) == set()
    assert {"POST /v1/completions", "GET /v1/responses/{response_id}"} <= found


@pytest.mark.parametrize("path", routes.posts(Needs.STEPS))
def test_what_takes_steps(pair, proxy, path):
    awake(proxy, pair[0])
    given = {**FORM, "data": {"model": pair[0].model}} if "/audio/" in path else {}
    given = given or {"json": asked(pair[0], path)}
    assert alike(proxy.users.post(path, **given)) == alike(pair[0].http.post(path, **given))
    assert proxy.quiet()


@pytest.mark.parametrize("path", routes.posts(Needs.TEXT))
def test_what_takes_no_steps_wakes_nothing(pair, proxy, path):
    awake(proxy, pair[0])
    assert pair[1].is_sleeping()
    given = asked(pair[1], path)
    answer = proxy.users.post(path, json=given)
    if path in SERVED:
        assert answer.status_code == 200, answer.text
    assert alike(answer) == alike(pair[1].http.post(path, json=given))
    assert pair[1].is_sleeping()
    assert not pair[0].is_sleeping()


def test_a_form_goes_to_the_model_that_it_names(pair, proxy):
    path = "/v1/audio/transcriptions"
    for server in pair:
        before = proxy.metric(f'requests_total{{server="{server.http.base_url}')
        proxy.users.post(path, data={"model": server.model}, **FORM)
        assert proxy.metric(f'requests_total{{server="{server.http.base_url}') == before + 1
    answer = proxy.users.post(path, data={"model": "nobody"}, **FORM)
    assert (answer.status_code, "no model 'nobody'" in answer.text) == (404, True)
    answer = proxy.users.post(path, data={}, **FORM)
    assert (answer.status_code, "name a model" in answer.text) == (400, True)
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    answer = proxy.users.post(path, content=b"not a form", headers=multipart)
    assert (answer.status_code, "is not a form" in answer.text) == (400, True)


def test_one_model(pair, proxy):
    listed = proxy.users.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [server.model for server in pair]
    for model in listed:
        assert proxy.users.get(f"/v1/models/{model['id']}").json() == model
    answer = proxy.users.get("/v1/models/of/nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert answer.json()["error"]["param"] is None


def test_a_stored_response_is_found_at_the_server_that_keeps_it(pair, proxy):
    first, second = pair
    for server, other in ((first, second), (second, first)):
        given = asked(server, "/v1/responses")
        response = proxy.users.post("/v1/responses", json=given).json()
        awake(proxy, other)
        assert server.is_sleeping()
        path = f"/v1/responses/{response['id']}"
        assert proxy.users.get(path).json() == response
        assert server.is_sleeping()
    answer = proxy.users.get("/v1/responses/resp_nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no server has this response"


def in_flight(proxy, server) -> int:
    (state,) = (each for each in proxy.status() if server.model in each["models"])
    return state["in_flight"]


def test_a_response_in_the_background_keeps_its_turn(pair, proxy):
    given = {**asked(pair[0], "/v1/responses"), "max_output_tokens": 400}
    expected = proxy.users.post("/v1/responses", json=given).json()
    started = proxy.users.post("/v1/responses", json={**given, "background": True}).json()
    assert in_flight(proxy, pair[0]) == 1
    assert started["status"] in ("queued", "in_progress")
    awake(proxy, pair[1])  # which waits for the response
    found = proxy.users.get(f"/v1/responses/{started['id']}").json()
    assert found["status"] == expected["status"] == "incomplete"  # it ended at its length
    assert texts(found) == texts(expected)
    assert proxy.quiet()


def test_a_response_in_the_background_is_cancelled(pair, proxy):
    given = {**asked(pair[0], "/v1/responses"), "max_output_tokens": 400, "background": True}
    started = proxy.users.post("/v1/responses", json=given).json()
    answer = proxy.users.post(f"/v1/responses/{started['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    wait_for(lambda: not pair[0].runs_requests(), "the engine to end it")
    wait_for(proxy.quiet, "the proxy to leave the turn")


def test_a_server_that_refuses_does_not_hide_a_response(pair, third):
    """The first one asked wants a key that the user does not have."""
    with Proxy([third, pair[0]], env={"VLLM_API_KEY": API_KEY}) as proxy:
        response = proxy.users.post("/v1/responses", json=asked(pair[0], "/v1/responses")).json()
        assert proxy.users.get(f"/v1/responses/{response['id']}").json() == response


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/responses", "multipart/form-data; boundary=x"),
        ("/v1/completions", "multipart/form-data; boundary=x"),
        ("/v1/audio/translations", "multipart/form-data"),
        ("/v1/audio/translations", "multipart/form-data; boundary=x; charset=undefined"),
    ],
)
def test_a_body_of_the_wrong_kind_keeps_no_turn(pair, proxy, path, kind):
    part = (
        f'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n{pair[0].model}\r\n--x--\r\n'
    )
    answer = proxy.users.post(path, content=part.encode(), headers={"content-type": kind})
    assert answer.status_code in (400, 404)
    assert proxy.quiet()


def test_the_host_header_does_not_choose_the_path(pair, proxy):
    answer = proxy.users.post(
        "/v1/completions", json=asked(pair[0], "/v1/completions"), headers={"Host": "x/sleep?"}
    )
    assert answer.status_code in (200, 400)
    assert not pair[0].is_sleeping()


def test_what_the_proxy_lacks_is_refused_in_vllm_s_form(proxy):
    for method, path, status in (("GET", "/nothing", 404), ("PUT", "/v1/completions", 405)):
        answer = proxy.users.request(method, path)
        assert answer.status_code == answer.json()["error"]["code"] == status


def test_a_server_without_realtime_refuses_a_session_itself(pair, proxy):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect  # which few tests need

    url = f"ws://127.0.0.1:{proxy.port}/v1/realtime?model={pair[0].model}"
    with pytest.raises(InvalidStatus) as refused, connect(url, proxy=None):
        pass
    assert refused.value.response.status_code == 403
    assert in_flight(proxy, pair[0]) == 0
    awake(proxy, pair[1])
