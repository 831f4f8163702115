# SPDX-License-Identifier: Apache-2.0
"""The proxy's admin port without a process: who may ask, what it says, the files of its page. About
five seconds."""

import asyncio
import contextlib
import json
import os
import re
import socket
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.tells import Tells

from vllm_sleep_ascend.client.calls import CallFailed, NoServer
from vllm_sleep_ascend.client.sleep_client import SleepClient
from vllm_sleep_ascend.proxy import states
from vllm_sleep_ascend.proxy.http import events, page
from vllm_sleep_ascend.proxy.http import status as statuses
from vllm_sleep_ascend.proxy.http.admin import Admin
from vllm_sleep_ascend.proxy.launch import ports
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.servers import Operation, Server
from vllm_sleep_ascend.proxy.turns import Settings, Turns

KEY = "key-of-this-admin-port"
HERE = "http://127.0.0.1:8100"
FILES = page.files()
MIB = 1 << 20


@cache
def client() -> SleepClient:
    """One for all: it takes longer to make than all else here."""
    return SleepClient("http://127.0.0.1:1")


def server(name: str) -> Server:
    return Server(client(), name, (name,))


def turns_of(*servers: Server) -> Turns:
    return Turns(list(servers), Metrics(), Settings())


def ask(admin: Admin, method: str, path: str, **headers: str) -> httpx.Response:
    """``_`` in a header's name stands for ``-``."""

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(admin.app)
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as http:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            return await http.request(method, path, headers=names)

    return asyncio.run(call())


@pytest.fixture(autouse=True)
def our_user(monkeypatch):
    """Has sent the requests, which come through no socket here."""
    monkeypatch.setattr(ports, "users_of", lambda port, peer: {os.geteuid()})


PAGE = {"origin": HERE, "sec_fetch_site": "same-origin", "x_vllm_sleep": "1"}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (404, {}),  # no page: a program of the operator's
        (404, PAGE),
        (404, {"host": "localhost:8100", **PAGE, "origin": "http://localhost:8100"}),
        (404, {"host": "[::1]:8100", **PAGE, "origin": "http://[::1]:8100"}),
        (403, {"host": "evil.example:8100"}),
        (403, {"host": "evil.example:8100", **PAGE, "origin": "http://evil.example:8100"}),
        (403, {"host": "127.0.0.1.evil.example"}),
        (403, {"host": ""}),
        (403, {**PAGE, "origin": "https://evil.example"}),
        (403, {**PAGE, "origin": "http://127.0.0.1:9999"}),
        (403, {**PAGE, "origin": "http://[broken"}),
        (403, {**PAGE, "origin": "null"}),
        (403, {**PAGE, "sec_fetch_site": "cross-site"}),
        (403, {**PAGE, "sec_fetch_site": "same-site"}),
        (403, {"origin": HERE, "sec_fetch_site": "same-origin"}),
        (403, {"referer": f"{HERE}/"}),
        (403, {"sec_fetch_site": "none"}),
    ],
)
def test_only_the_page_and_programs_may_change_something(status, headers):
    """404 is the answer to whoever may: there is no such model."""
    admin = Admin(turns_of(server("a"), server("b")))
    for action in ("sleep", "wake", "stop"):
        answer = ask(admin, "POST", f"/{action}?model=c", **headers)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == status


def test_nothing_is_changed_by_reading():
    admin = Admin(turns_of(server("a")))
    for action in ("sleep", "wake", "stop"):
        assert ask(admin, "GET", f"/{action}?model=a", **PAGE).status_code == 405


@pytest.mark.parametrize("path", ["/status", "/metrics", "/log?model=a", "/events"])
def test_other_pages_may_not_read(path):
    admin = Admin(turns_of(server("a")))
    for headers in (
        {"origin": "https://evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"host": "evil.example:8100"},
    ):
        assert ask(admin, "GET", path, **headers).status_code == 403


@pytest.mark.parametrize("path", FILES)
def test_the_files_of_the_page_need_no_key_and_other_pages_may_link_to_them(path):
    admin = Admin(turns_of(), KEY)
    answer = ask(admin, "GET", path, sec_fetch_site="cross-site")
    assert answer.status_code == 200
    assert (answer.content, answer.headers["content-type"]) == FILES[path]
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} < set(policy)
    assert "require-trusted-types-for 'script'" in policy
    assert not [part for part in policy if "unsafe" in part or "*" in part or "http" in part]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/status"),
        ("GET", "/events"),
        ("GET", "/metrics"),
        ("GET", "/log?model=a"),
        ("POST", "/sleep?model=c"),
        ("POST", "/"),
        ("GET", "/%2e/status"),
        ("GET", "/nothing"),
    ],
)
def test_all_else_needs_the_key(method, path):
    admin = Admin(turns_of(server("a"), server("b")), KEY)
    for given in (None, "", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
        headers = {} if given is None else {"authorization": given}
        answer = ask(admin, method, path, **PAGE, **headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text


def test_with_the_key():
    admin = Admin(turns_of(server("a")), KEY)
    right = {"authorization": f"Bearer {KEY}"}
    assert ask(admin, "GET", "/status", **right).status_code == 200
    # Behind a proxy with TLS, which the key allows:
    outside = {"host": "models.example", "origin": "https://models.example", "x_vllm_sleep": "1"}
    assert ask(admin, "POST", "/sleep?model=c", **right, **outside).status_code == 404
    outside["origin"] = "https://evil.example"
    assert ask(admin, "POST", "/sleep?model=c", **right, **outside).status_code == 403
    assert ask(admin, "GET", "/health").status_code == 200


def test_a_header_that_is_there_twice():
    admin = Admin(turns_of(), KEY)

    async def call() -> list[int]:
        transport = httpx.ASGITransport(admin.app)
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as http:
            twice = [("authorization", "Bearer wrong"), ("authorization", f"Bearer {KEY}")]
            return [
                (await http.get("/status", headers=headers)).status_code
                for headers in (twice, [("origin", HERE), ("origin", "https://evil.example")])
            ]

    assert asyncio.run(call()) == [400, 400]


@pytest.mark.parametrize("users", [{os.geteuid() + 1}, {os.geteuid(), 12345}, set()])
def test_another_user_needs_the_key_to_stop_a_server_or_to_read_its_log(monkeypatch, users):
    monkeypatch.setattr(ports, "users_of", lambda port, peer: users)
    without, with_key = Admin(turns_of(server("a"))), Admin(turns_of(server("a")), KEY)
    right = {"authorization": f"Bearer {KEY}"}
    for method, path in (("POST", "/stop?model=a"), ("GET", "/log?model=a")):
        answer = ask(without, method, path)
        assert answer.status_code == 403
        assert "--admin-key-file" in answer.json()["error"]["message"]
        assert ask(with_key, method, path, **right).status_code == 409
    assert ask(without, "GET", "/status").status_code == 200


def test_whose_a_connection_is(monkeypatch):
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as here:
        peer = here.getsockname()[1]
        with socket.create_connection(("127.0.0.1", peer)) as client:
            port = client.getsockname()[1]
            taken, _ = here.accept()
            assert ports.users_of(port, peer) == {os.geteuid()}
        assert ports.users_of(port, peer) == set()  # closed, so nobody's
        taken.close()


def test_a_server_of_somebody_else_has_no_log_and_no_stop():
    admin = Admin(turns_of(server("a")))
    for method, path in (("POST", "/stop?model=a"), ("GET", "/log?model=a")):
        answer = ask(admin, method, path)
        assert answer.status_code == 409
        assert "ask whoever has started it" in answer.json()["error"]["message"]


def test_states_are_kept_for_an_hour_and_not_without_bound(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(states.time, "time", lambda: clock[0])
    history = states.History()
    for state in ("awake", "awake", "asleep"):
        clock[0] += 10
        history.enter(state)
    assert [(at, state) for _, at, state in history.after(0)] == [
        (1000.0, "unknown"),
        (1010.0, "awake"),
        (1030.0, "asleep"),
    ]
    assert history.after(history.number) == []
    clock[0] += states.KEPT_S + 1
    assert [state for _, _, state in history.after(0)] == ["asleep"]  # as the hour began
    for _ in range(2000):
        history.enter("awake")
        history.enter("asleep")
    assert len(history.after(0)) == 1000
    assert states.History().id != history.id


def rank(index: int, free: int, copied: int, **tags: int) -> dict[str, Any]:
    usages = {tag: {"device": n * MIB, "host": 3 * MIB, "disk": 0} for tag, n in tags.items()}
    last = {"operation": "wake", "copied_bytes": copied, "seconds": 0.5 + index}
    return {
        "rank": index,
        "device": index,
        "free": free * MIB,
        "total": 100 * MIB,
        "held": (100 - free) * MIB,
        "share": 100 * MIB,
        "enabled": True,
        "tags": usages,
        "last_operation": last,
        "resident": {"context": 2 * MIB, "graphs": 0},
    }


def test_memory_by_device_model_and_tag():
    both = Tells([rank(0, 40, 10, weights=30, kv_cache=20), rank(1, 60, 30, weights=30)])
    pair = Server(both, "pair", devices=(4, 6))
    one = Server(Tells([rank(0, 39, 0, weights=5)]), "one", devices=(4,))
    stock, stopped = Server(Tells(None), "stock"), Server(Tells([]), "stopped")
    for each in (pair, one, stock):
        each.state = "awake"
    stopped.state = "stopped"
    pair.last_operation = Operation("wake", 1.75, 5.0)
    one.last_operation = Operation("sleep", 0.25, 6.0)
    admin = Admin(turns_of(pair, one, stock, stopped))
    said = ask(admin, "GET", "/status").json()
    assert said["devices"] == [] and said["servers"][0]["memory"] is None
    assert both.asked == 0
    said = ask(admin, "GET", "/status?memory=1").json()
    a, b = pair.history.id, one.history.id
    sizes = {
        each["device"]: {(h["server"], h["tag"]): h["bytes"] // MIB for h in each["held"]}
        for each in said["devices"]
    }
    assert sizes == {
        "4": {
            (a, "weights"): 30,
            (a, "kv_cache"): 20,
            (a, "context"): 2,
            (b, "weights"): 5,
            (b, "context"): 2,
        },
        "6": {(a, "weights"): 30, (a, "context"): 2},
    }
    assert [each["total"] for each in said["devices"]] == [100 * MIB] * 2
    assert said["devices"][1]["free"] == 60 * MIB
    servers = {each["name"]: each for each in said["servers"]}
    assert servers["pair"]["memory"] == {"device": 80 * MIB, "host": 9 * MIB, "disk": 0}
    assert servers["pair"]["last_operation"] == {
        "operation": "wake",
        "seconds": 1.75,
        "ended": 5.0,
        "copied_bytes": 40,
        "copy_seconds": 1.5,
    }
    assert share_of_link(pair, 1e-8) == 1.333  # 40 bytes over two links of 10 bytes a second
    # What the server tells is of another operation.
    assert servers["one"]["last_operation"] == {"operation": "sleep", "seconds": 0.25, "ended": 6.0}
    assert servers["stock"]["memory"] is servers["stopped"]["memory"] is None
    pair.state = "stopped"
    assert ask(admin, "GET", "/status").json()["servers"][0]["memory"] is None


def share_of_link(server: Server, link_gb_s: float) -> float:
    turns = Turns([server], Metrics(), Settings(link_gb_s=link_gb_s))
    (said,) = ask(Admin(turns), "GET", "/status").json()["servers"]
    share: float = said["last_operation"]["link_share"]
    return share


def memory_of(admin: Admin, path: str = "/status") -> Any:
    said = ask(admin, "GET", path).json()
    return said["servers"][0]["memory"], len(said["devices"])


def test_memory_that_was_told_long_ago_or_by_a_server_that_is_gone_is_not_shown(monkeypatch):
    tells = Tells([rank(0, 40, 10, weights=30)])
    one = Server(tells, "a", devices=(0,))
    one.state = "awake"
    admin = Admin(turns_of(one))
    told = {"device": 30 * MIB, "host": 3 * MIB, "disk": 0}
    assert memory_of(admin, "/status?memory=1") == (told, 1)
    assert memory_of(admin) == (told, 1)
    tells.said = CallFailed("it sleeps just now")
    assert memory_of(admin, "/status?memory=1") == (told, 1)
    with monkeypatch.context() as later:
        later.setattr(statuses, "RECENT_S", 0.0)
        assert memory_of(admin) == (None, 0)
    tells.said = NoServer("nobody")
    assert memory_of(admin, "/status?memory=1") == (None, 0)


def test_devices_are_in_the_order_of_their_numbers():
    ranks = [rank(0, 40, 10), rank(1, 40, 10)]
    one = Server(Tells(ranks), "a", devices=(10, 2))
    one.state = "awake"
    said = ask(Admin(turns_of(one)), "GET", "/status?memory=1").json()
    assert [each["device"] for each in said["devices"]] == ["2", "10"]


def test_events_say_what_has_changed(monkeypatch):
    """To all who listen, from one look."""
    one = server("a")
    turns = turns_of(one)
    admin = Admin(turns)
    looks = []
    describe = admin._said.describe
    monkeypatch.setattr(admin._said, "describe", lambda: (looks.append(0), describe())[1])

    async def follow() -> list[dict[str, Any]]:
        streams = [admin._events.events() for _ in range(8)]
        with contextlib.ExitStack() as open_ones:
            for _ in streams:
                open_ones.enter_context(admin._events.looking())
            said = [await anext(stream) for stream in streams]
            assert len(looks) == 1
            coming = [asyncio.ensure_future(anext(stream)) for stream in streams]
            while len(looks) < 4:
                await asyncio.sleep(0.01)
            assert not any(each.done() for each in coming)  # nothing has changed
            before = len(looks)
            for state in ("awake", "asleep"):
                one.state = state
            said += await asyncio.gather(*coming)
            assert len(looks) == before + 1
            admin.close()
            assert [await anext(stream, None) for stream in streams] == [None] * 8
        assert admin._events._looking is None
        events = [json.loads(text.removeprefix("data: ")) for text in said]
        for event in events:
            del event["now"]
        assert events == [events[0]] * 8 + [events[8]] * 8
        return [events[0], events[8]]

    first, second = asyncio.run(follow())
    assert [state for _, _, state in first["history"]] == ["unknown"]
    assert [state for _, _, state in second["history"]] == ["awake", "asleep"]
    assert second["servers"][0]["state"] == "asleep"
    assert {id for id, _, _ in second["history"]} == {second["servers"][0]["id"]}


def test_not_all_descriptors_go_to_pages():
    admin = Admin(turns_of())
    admin._events._open = events.MOST
    answer = ask(admin, "GET", "/events")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "10"


TEXTS = json.loads(FILES["/texts.json"][0])
SCRIPTS = "".join(FILES[f"/{name}.js"][0].decode() for name in ("page", "view", "words"))


def test_both_languages_have_the_same_texts():
    english, chinese = TEXTS["en"], TEXTS["zh"]
    assert english.keys() == chinese.keys()
    for name, text in english.items():
        assert re.findall(r"\{\w+\}", text) == sorted(
            re.findall(r"\{\w+\}", chinese[name]), key=re.findall(r"\{\w+\}", text).index
        ), name


def test_every_text_is_used_and_every_used_one_is_there():
    html = FILES["/"][0].decode()
    named = set(re.findall(r'data-text="(\w+)"', html)) | set(re.findall(r'say\("(\w+)"', SCRIPTS))
    assert named <= TEXTS["en"].keys()
    # The others are named by what the proxy says.
    kinds = ("state_", "tag_", "op_", "ask_", "why_", "on_")
    others = TEXTS["en"].keys() - named
    assert {n for n in others if not n.startswith(kinds)} <= set(re.findall(r'"(\w+)"', SCRIPTS))
    assert {n for n in TEXTS["en"] if n.startswith("state_")} == {
        f"state_{state}" for state in states.STATES
    }


class Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        self.found |= {value or "" for name, value in attrs if name in ("src", "href")}


def test_nothing_comes_from_elsewhere_and_nothing_is_inline():
    read = Resources()
    read.feed(FILES["/"][0].decode())
    assert read.found == {"icon.svg", "style.css", "page.js"}
    assert not [name for name in read.attributes if name == "style" or name.startswith("on")]
    for text in (SCRIPTS, FILES["/style.css"][0].decode()):
        assert not re.search(r"https?:|//[a-z]|url\(|@import|innerHTML|outerHTML|insertAdj", text)
    assert set(FILES) == {"/", *(f"/{name}" for name in imported())}


def imported() -> set[str]:
    """All files of the page but itself."""
    scripts = set(re.findall(r'from "\./(\w+\.js)"', SCRIPTS))
    return scripts | {"page.js", "style.css", "icon.svg", "texts.json"}


def test_text_and_signs_stand_out_in_light_and_dark():
    """By the rules of WCAG 2.2: 4.5 for text, 3 for what has a meaning of its own."""
    css = FILES["/style.css"][0].decode()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", css, flags=re.S)
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for text, ground in (
            *((name, on) for name in ("text", "dim", "link", "bad") for on in ("card", "page")),
            ("on-link", "link"),
        ):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        signs = [name for name in colours if name.startswith("hue-")]
        for name in (*signs, "awake", "asleep", "moving", "unknown", "stopped", "others"):
            assert contrast(colours[name], colours["card"]) >= 3, name


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_files_are_those_of_the_folder():
    folder = Path(page.__file__).parent
    names = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {f"/{name}" for name in names} == {*FILES, "/index.html"} - {"/"}
