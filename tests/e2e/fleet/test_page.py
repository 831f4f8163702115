# SPDX-License-Identifier: Apache-2.0
"""The page of the admin port in a real browser. The servers are stand-ins for vLLM. 18 seconds."""

import http.server
import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from helpers import browser as browsers
from helpers.browser import Browser
from helpers.fleet import Fleet, stand_in
from helpers.patience import wait_for

pytestmark = pytest.mark.skipif(browsers.PROGRAM is None, reason=browsers.MISSING)

KEY = "key-of-this-admin-port"
MARKUP = "<img src=x onerror=\"document.title='taken'\">"
TAB, ENTER, ESCAPE = ("Tab", 9), ("Enter", 13, "\r"), ("Escape", 27)
"""For ``Browser.press``."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    written_over = "10%\r\x1b[?25l90%\r\x1b]0;title\x07"
    markup = f"{MARKUP}</pre><script>document.title='taken'</script>"
    log_line = f"{written_over}\x1b[36m(Engine)\x1b[0m {markup}"
    models = {
        name: stand_in(folder, name, "--reports-memory", "--says", log_line, devices=0)
        for name in ("model-a", "model-b", MARKUP)
    }
    with Fleet(folder, models, "--link-gbps", "4") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(fleet, browser) -> Iterator[Browser]:
    """The page, wide and in English, with what servers say; nothing in it fails."""
    browser.prefer("en-US")
    browser.resize(1280, 900)
    browser.open(url(fleet))
    browser.js("localStorage.clear()")
    browser.open(url(fleet))
    browser.wait("document.querySelectorAll('#models tbody tr').length === 3")
    browser.complaints.clear()
    yield browser
    assert browser.complaints == []


def url(fleet: Fleet) -> str:
    return f"http://127.0.0.1:{fleet.admin_port}/"


def row(fleet: Fleet, name: str) -> str:
    """A selector."""
    return f"#models tr[data-id='{fleet.status()[name]['id']}']"


def button(fleet: Fleet, name: str, action: str) -> str:
    at = ("wake", "sleep", "stop", "log").index(action) + 1
    return f"{row(fleet, name)} .actions button:nth-of-type({at})"


def press(page: Browser, fleet: Fleet, name: str, action: str) -> None:
    """Press a button and confirm."""
    page.click(button(fleet, name, action))
    page.wait("document.getElementById('confirm').open")
    page.click("#confirm-yes")


def wait_for_state(page: Browser, fleet: Fleet, name: str, state: str) -> None:
    selector = json.dumps(row(fleet, name))
    page.wait(f"document.querySelector({selector}).dataset.state === '{state}'")


def wait_for_text(page: Browser, selector: str, text: str) -> None:
    """Of what servers tell when they are asked, each in its own time."""
    page.wait(f"document.querySelector({json.dumps(selector)})?.innerText === {json.dumps(text)}")


def test_a_switch_between_two_models(page, fleet):
    before = len(fleet.events())
    page.click(button(fleet, "model-a", "wake"))
    assert page.text("#confirm-title") == "Wake model-a?"
    page.click("#confirm button[value='']")
    page.wait("!document.getElementById('confirm').open")
    assert fleet.events()[before:] == []
    press(page, fleet, "model-a", "wake")
    wait_for_state(page, fleet, "model-a", "awake")
    press(page, fleet, "model-b", "wake")
    wait_for_state(page, fleet, "model-b", "awake")
    wait_for_state(page, fleet, "model-a", "asleep")
    assert fleet.events()[before:] == ["model-a starts 0", "model-a sleeps", "model-b starts 0"]
    assert fleet.states() == {"model-a": "asleep", "model-b": "awake", MARKUP: "stopped"}

    wait_for_text(page, ".card p", "448 MiB of 1 GiB in use, 576 MiB free")
    held = ["model-b: weights\t300 MiB", "model-b: KV cache\t148 MiB"]
    wait_for_text(page, ".card tbody", "\n".join(held))
    a, b = row(fleet, "model-a"), row(fleet, "model-b")
    page.wait(f'document.querySelector("{a} .memory").innerText.includes("host 300 MiB")')
    assert page.text(f"{a} .state") == "asleep\n\nlevel 1"
    assert "fell asleep in" in page.text(f"{a} .last")
    assert "300 MiB at 3.15 GB/s\n\n79 % of the link" in page.text(f"{a} .last")
    assert "started in" in page.text(f"{b} .last") and "GB/s" not in page.text(f"{b} .last")
    page.wait("document.getElementById('said').innerText.endsWith('model-b is awake')")
    lanes = (
        "[...document.querySelectorAll('.states')].map(l => [...l.children].map(s => s.className))"
    )
    states = page.js(lanes)
    assert states[0][-3:] == ["starting", "awake", "asleep"]
    assert states[1][-2:] == ["starting", "awake"]

    press(page, fleet, "model-b", "sleep")
    wait_for_state(page, fleet, "model-b", "asleep")
    press(page, fleet, "model-b", "stop")
    wait_for_state(page, fleet, "model-b", "stopped")
    assert fleet.events()[before + 3 :] == ["model-b sleeps", "model-b ends"]
    assert page.js(f'document.querySelector("{button(fleet, "model-b", "stop")}").disabled')


def test_a_request_is_seen(page, fleet):
    """Nobody presses anything."""
    fleet.pid_of("model-b")
    wait_for_state(page, fleet, "model-b", "awake")
    fleet.pid_of("model-a")
    wait_for_state(page, fleet, "model-a", "awake")
    wait_for_state(page, fleet, "model-b", "asleep")


def test_running_requests_end_before_a_server_stops(page, fleet, tmp_path):
    door = tmp_path / "door"
    pid = fleet.pid_of("model-a")
    answers: list[httpx.Response] = []
    asked = threading.Thread(target=lambda: answers.append(fleet.ask("model-a", f"until {door}")))
    asked.start()
    queue = row(fleet, "model-a") + " .queue"
    page.wait(f'document.querySelector("{queue}").innerText === "1 running"')
    press(page, fleet, "model-a", "stop")
    head = f'document.querySelector("{row(fleet, "model-a")} th").innerText'
    page.wait(f"{head}.includes('closes after its requests')")
    assert fleet.status()["model-a"]["closing"]
    assert page.js(f'document.querySelector("{button(fleet, "model-a", "sleep")}").disabled')
    assert fleet.status()["model-a"]["pid"] == pid
    door.touch()
    asked.join()
    assert [answer.json()["pid"] for answer in answers] == [pid]
    wait_for_state(page, fleet, "model-a", "stopped")
    assert fleet.status()["model-a"]["deaths"] == 0
    assert fleet.pid_of("model-a") != pid


def test_what_is_refused_is_said(page, fleet):
    with_error = (
        'fetch = async () => new Response(\'{"error": {"message": "<b>why</b>"}}\', {status: 503})'
    )
    page.js(f"window.{with_error}; 0")
    press(page, fleet, "model-b", "stop" if fleet.states()["model-b"] != "stopped" else "wake")
    page.wait("!document.getElementById('notice').hidden")
    assert page.text("#notice").endswith("of model-b: <b>why</b>")


def test_markup_in_names_and_logs_is_text(page, fleet):
    assert page.text(f"{row(fleet, MARKUP)} th") == MARKUP
    fleet.pid_of(MARKUP)
    wait_for_state(page, fleet, MARKUP, "awake")
    page.click(button(fleet, MARKUP, "log"))
    page.wait("document.getElementById('log-text').innerText.includes('(Engine)')")
    shown = f"(Engine) {MARKUP}</pre><script>document.title='taken'</script>"
    assert page.text("#log-text") == shown
    assert page.text("#log-title") == f"Log of {MARKUP}"
    page.press(*ESCAPE)
    page.wait("!document.getElementById('log').open")
    assert page.js("document.images.length") == 0
    assert page.js("document.querySelectorAll('script').length") == 1
    assert page.js("document.title") == "vLLM sleep"
    # Nor could the page do it.
    tried = "(() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } })()"
    assert page.js(tried) == "TypeError"
    page.complaints.clear()


def test_by_keyboard(page, fleet):
    fleet.pid_of("model-a")
    wait_for_state(page, fleet, "model-a", "awake")
    wanted = (
        f'document.activeElement === document.querySelector("{button(fleet, "model-a", "sleep")}")'
    )
    for _ in range(20):
        page.press(*TAB)
        if page.js(wanted):
            break
    assert page.js(wanted)
    page.press(*ENTER)
    page.wait("document.getElementById('confirm').open")
    assert page.js("document.activeElement.innerText") == "Cancel"
    page.press(*ESCAPE)
    page.wait("!document.getElementById('confirm').open")
    assert page.js(wanted)
    assert fleet.states()["model-a"] == "awake"
    unnamed = "[...document.querySelectorAll('button')].filter(b => !b.innerText && !b.ariaLabel)"
    assert page.js(f"{unnamed}.filter(b => b.offsetParent).length") == 0


def test_both_languages(page, fleet):
    assert page.text("#models-title") == "Models"
    assert page.js("document.documentElement.lang") == "en"
    page.prefer("zh-CN")
    page.open(url(fleet))
    page.wait("document.querySelectorAll('#models tbody tr').length === 3")
    assert page.text("#models-title") == "模型"
    assert page.js("document.documentElement.lang") == "zh-CN"
    assert page.text(button(fleet, "model-a", "wake")) == "唤醒"
    page.click("#language")
    assert page.text("#models-title") == "Models"
    assert page.text(button(fleet, "model-a", "wake")) == "Wake"
    page.open(url(fleet))
    page.wait("document.querySelectorAll('#models tbody tr').length === 3")
    assert page.text("#models-title") == "Models"  # as chosen


@pytest.mark.parametrize("width", [320, 390, 768])
def test_on_narrow_screens(page, fleet, width):
    page.resize(width, 800)
    page.wait(f"innerWidth === {width}")
    assert page.js("document.documentElement.scrollWidth") == width
    if width < 600:
        sizes = "[...document.querySelectorAll('#models button')].filter(b => b.offsetParent)"
        assert page.js(f"Math.min(...{sizes}.map(b => b.offsetHeight))") >= 44
        page.click(button(fleet, "model-a", "log"))
        page.wait("document.getElementById('log').open")
        assert page.js("document.getElementById('log').getBoundingClientRect().right") <= width


def test_after_the_proxy_was_away(page, fleet):
    pid = fleet.pid_of("model-a")
    fleet.process.kill()
    fleet.process.wait()
    page.wait("document.getElementById('connection').dataset.kind === 'wait'")
    fleet.start()
    page.wait("document.getElementById('connection').innerText === 'live'")
    wait_for_state(page, fleet, "model-a", "awake")
    assert fleet.status()["model-a"]["pid"] == pid
    page.complaints.clear()  # of the connection


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A page of somebody else."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["localhost", browsers.ELSEWHERE])
def elsewhere(request) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{request.param}:{server.server_port}/"
        server.shutdown()


def test_another_page_cannot_change_anything_or_read(browser, fleet, elsewhere):
    fleet.pid_of("model-a")
    before, state = fleet.events(), fleet.states()
    browser.open(elsewhere)
    browser.answers.clear()
    for address in (url(fleet), f"http://localhost:{fleet.admin_port}/"):
        before_these = browser.answers.count(403)
        for action in ("sleep", "stop"):
            for options in ("mode: 'no-cors'", "headers: {}", "headers: {'X-Vllm-Sleep': '1'}"):
                sent = f"fetch('{address}{action}?model=model-a', {{method: 'POST', {options}}})"
                assert browser.js(f"{sent}.then(a => a.type, e => e.name)") == "TypeError"
        for path in ("status", "events", "log?model=model-a"):
            read = f"fetch('{address}{path}').then(a => a.text(), e => e.name)"
            assert browser.js(read) == "TypeError"
        browser.js(
            "f = document.createElement('form'); f.method = 'POST'; f.target = 'frame';"
            f"f.action = '{address}stop?model=model-a';"
            "i = document.createElement('iframe'); i.name = 'frame';"
            "document.body.replaceChildren(f, i); f.submit()"
        )
        # A browser may ask first whether it may, which is refused as well.
        wait_for(lambda n=before_these + 10: browser.js("1") and browser.answers.count(403) >= n)
        assert set(browser.answers) <= {200, 403}
    assert (fleet.events(), fleet.states()) == (before, state)


def test_another_name_of_this_machine_is_refused(browser, fleet):
    """As of a page whose name was made to mean this machine (DNS rebinding)."""
    browser.open(f"http://{browsers.ELSEWHERE}:{fleet.admin_port}/")
    assert "the request is for another host" in browser.text("body")


def test_the_key(tmp_path, browser):
    """And the proxy's end, which does not wait for open pages."""
    models = {"a": stand_in(tmp_path, "a")}
    with Fleet(tmp_path, models, "--grace-s", "3600", SLEEP_ADMIN_KEY=KEY) as fleet:
        browser.prefer("en-US")
        browser.open(url(fleet))
        browser.wait("document.activeElement.id === 'key'")
        assert browser.text("#login-error") == ""
        browser.write(KEY + "x")
        browser.press(*ENTER)
        browser.wait("document.getElementById('login-error').innerText === 'This key is wrong.'")
        assert browser.js("document.getElementById('models').offsetParent") is None
        browser.write(KEY)
        browser.press(*ENTER)
        browser.wait("document.querySelectorAll('#models tbody tr').length === 1")
        assert fleet.states() == {"a": "stopped"}
        press(browser, fleet, "a", "wake")
        wait_for_state(browser, fleet, "a", "awake")
        browser.open(url(fleet))
        browser.wait("document.querySelectorAll('#models tbody tr').length === 1")
        assert KEY not in browser.js(
            "location.href + JSON.stringify(localStorage) + document.cookie"
        )
        tab = "sessionStorage.getItem('vllm-sleep-key')"
        assert browser.js(tab) == KEY
        browser.click("#forget")
        browser.wait("document.activeElement.id === 'key'")
        assert browser.js("sessionStorage.length") == 0
        browser.write(KEY)
        browser.press(*ENTER)
        browser.wait("document.getElementById('connection').innerText === 'live'")
        fleet.end()
        assert KEY not in fleet.log.read_text()
