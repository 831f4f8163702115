# SPDX-License-Identifier: Apache-2.0
"""models.yaml of the proxy: what it may have, and what is said of each mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.patience import patience

from vllm_sleep_ascend.proxy.config.lines import Invalid
from vllm_sleep_ascend.proxy.config.model import Model, secrets
from vllm_sleep_ascend.proxy.config.models import load

KEY = "k" * 32
GOOD = """\
max_awake: fit
groups:
  big: {members: [large, elsewhere], swap: true, persistent: true}
models:
  small:
    command: vllm serve "Qwen 2" --port ${PORT} --enable-sleep-mode
    env: {OMP_NUM_THREADS: 4, HF_TOKEN: secret-of-mine}
    aliases: [default, gpt]
    devices: 0
    level: 2
    priority: -1
    preload: true
  large:
    command:
      - sh
      - -c
      - exec vllm serve large --port ${PORT} --admin-port ${ADMIN_PORT} --home ${HOME}
    devices: [0, 1]
    start_timeout_s: 60
    deep_sleep: disk
  elsewhere:
    url: http://127.0.0.1:8001/
    admin: unix:/run/vllm/admin
    admin_key_file: key
"""


def write(folder: Path, text: str) -> str:
    file = folder / "models.yaml"
    file.write_text(text)
    return str(file)


def problems(folder: Path, text: str) -> list[tuple[int, str]]:
    with pytest.raises(Invalid) as raised:
        load(write(folder, text), None)
    assert str(raised.value).splitlines()[0].startswith(f"{folder}/models.yaml:")
    return [(problem.line, problem.text) for problem in raised.value.problems]


def check(file: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm_sleep_ascend.proxy", "--config", file, "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60 * patience())


def test_a_good_file(tmp_path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    models = load(write(tmp_path, GOOD), "key-of-the-proxy-0")
    small, large, elsewhere = models.entries
    assert models.max_awake == "fit"
    assert small.group is None and large.group is elsewhere.group is not None
    assert (large.group.name, large.group.swap, large.group.exclusive) == ("big", True, False)
    assert (small.model.priority, large.model.priority) == (-1, 0)
    assert (small.model.deep_sleep, large.model.deep_sleep) == ("level-2", "disk")
    assert small.model.words(7, 8) == [
        *("vllm", "serve", "Qwen 2", "--port", "7", "--enable-sleep-mode")
    ]
    assert small.model.env == {"OMP_NUM_THREADS": "4", "HF_TOKEN": "secret-of-mine"}
    assert small.model.aliases == ("default", "gpt") and small.model.devices == (0,)
    assert small.model.level == 2 and small.model.preload
    assert large.model.words(7, 8)[2].endswith("--port 7 --admin-port 8 --home ${HOME}")
    stop = {"stop_command": "docker stop a-${PORT}"}
    assert Model(command=small.model.command, **stop).words(7, 8, stop=True) == [
        *("docker", "stop", "a-7")
    ]
    assert small.model.words(7, 8, stop=True) == []
    assert large.model.devices == (0, 1) and large.model.start_timeout_s == 60
    assert elsewhere.model.url == "http://127.0.0.1:8001"
    assert [entry.door_key for entry in (small, large, elsewhere)] == [
        *("key-of-the-proxy-0", "key-of-the-proxy-0", KEY)
    ]


def test_check_says_what_there_is(tmp_path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    file = write(tmp_path, GOOD)
    done = check(file)
    assert done.stdout == f"{file}: 3 models, of which the proxy starts 2\n"
    assert done.returncode == 0


def test_check_says_all_that_is_wrong(tmp_path):
    file = write(tmp_path, "models:\n  a: {levle: 1}\n  b:\n    url: x\n    level: 3\nmore: 1\n")
    done = check(file)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{file}:2: models.a: neither command nor url is there; write one of the two",
        f"{file}:2: models.a.levle: there is no such key; did you mean level?",
        f"{file}:4: models.b.url: 'x': it is no server's address; write such as "
        "http://127.0.0.1:8001",
        f"{file}:5: models.b.level: 3: there is no such level; write 1 or 2",
        f"{file}:6: more: there is no such key; there are models, max_awake, groups",
    ]
    started = subprocess.run(
        [sys.executable, "-m", "vllm_sleep_ascend.proxy", "--config", file],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )
    assert started.returncode == 1 and started.stderr == done.stdout


COMMAND = "command: serve --port ${PORT}"


@pytest.mark.parametrize(
    ("entry", "line", "said"),
    [
        ("command: ''", 3, "it is empty; write the program and its arguments"),
        ("command: 'serve \"x'", 3, "No closing quotation; close it"),
        ("command: {a: b}", 3, "write a line as for a shell, or a list"),
        ("command: [serve, true]", 3, "argument 1 is no string but a bool; put it in quotes"),
        ("command: serve", 3, "it has no ${PORT}; write --port ${PORT}"),
        (f"{COMMAND} --api-key=xyz", 3, "is in lists of processes; write VLLM_API_KEY in env"),
        (f"{COMMAND} --api_key xyz", 3, "write VLLM_API_KEY in env"),
        ("command: [sh, -c, 'serve ${PORT} --api-key x']", 3, "write VLLM_API_KEY in env"),
        (f'{COMMAND}\n    env: {{A: "\\ud800"}}', 4, "the value of A has half of a pair"),
        (f"{COMMAND}\n    7: x", 4, "7"),
        (f"{COMMAND}\n    url: http://a:1", 4, "both command and url are there; write one"),
        ("aliases: [b]", 2, "neither command nor url is there; write one of the two"),
        ("url: 127.0.0.1:8000", 3, "'127.0.0.1:8000': it is no server's address; write such as"),
        ("url: http://a:1/v1", 3, "'http://a:1/v1': it is no server's address"),
        ("url: http://me:pw@a:1", 3, "it has a password"),
        ("url: [1]", 3, "[1]: write such as http://127.0.0.1:8001"),
        ("url: http://a:1\n    admin: /run/x", 4, "'/run/x': write such as"),
        ("url: http://a:1\n    env: {A: b}", 4, "it is for a server with a command"),
        ("url: http://a:1\n    preload: false", 4, "it is for a server with a command"),
        ("url: http://a:1\n    admin_key_file: none", 4, "the file cannot be read: No such file"),
        (f"{COMMAND}\n    env: [A]", 4, "write a mapping of names to values"),
        (f"{COMMAND}\n    env: {{A-B: c}}", 4, "'A-B' is no name of a variable"),
        (f"{COMMAND}\n    env: {{A: true}}", 4, "the value of A is no string; put it in quotes"),
        (f"{COMMAND}\n    env: {{SLEEP_ADMIN_KEY: x}}", 4, "name a file in admin_key_file"),
        (f"{COMMAND} ${{ADMIN_PORT}}\n    admin: http://a:1", 4, "the command has ${ADMIN_PORT}"),
        (f"{COMMAND}\n    aliases: b", 4, "'b': write a list of names"),
        (f"{COMMAND}\n    aliases: [7]", 4, "7 is no string; put it in quotes"),
        (f"{COMMAND}\n    aliases: [x, a]", 4, "the name 'a' is also that of models.a"),
        (f"{COMMAND}\n    aliases: [x, x]", 4, "is also that of models.a.aliases.0"),
        (f"{COMMAND}\n    devices: -1", 4, "-1: write the numbers of devices, such as 0 or [0, 1]"),
        (f"{COMMAND}\n    devices: [0, 0]", 4, "[0, 0]: a device is there twice"),
        (f"{COMMAND}\n    devices: '0,1'", 4, "'0,1': write the numbers of devices"),
        (f"{COMMAND}\n    level: true", 4, "True: there is no such level; write 1 or 2"),
        (f"{COMMAND}\n    priority: high", 4, "'high': write a whole number from -100 to 100"),
        (f"{COMMAND}\n    priority: 101", 4, "101: write a whole number"),
        (f"{COMMAND}\n    preload: 1", 4, "1: write true or false"),
        (f"{COMMAND}\n    start_timeout_s: 0", 4, "0: write seconds, a number above 0"),
        (f"{COMMAND}\n    wake_timeout_s: .nan", 4, "nan: write seconds, a number above 0"),
        (f"{COMMAND}\n    stop_timeout_s: soon", 4, "'soon': write seconds"),
        (f"{COMMAND}\n    stop_command: docker 'stop", 4, "No closing quotation; close it"),
        (f"{COMMAND}\n    stop_command: halt --api-key s", 4, "a key there is in lists of"),
        ("url: http://a:1\n    stop_command: docker stop a", 4, "is for a server with a command"),
        (f"{COMMAND}\n    sleep_after: never", 4, "'never': write seconds"),
        (f"{COMMAND}\n    stop_after: 9\n    sleep_after: 9", 4, "is not after sleep_after; write"),
        (f"{COMMAND}\n    deep_sleep_after: 5\n    sleep_after: 9", 4, "write more than 9"),
        (f"{COMMAND}\n    level: 2\n    deep_sleep_after: 9", 5, "so each sleep is deep; remove"),
        (f"{COMMAND}\n    level: 2\n    deep_sleep: disk", 5, "so each sleep is deep; remove"),
        (f"{COMMAND}\n    deep_sleep: 2", 4, "2: there is no such sleep; write level-2 or disk"),
        ("url: http://a:1\n    stop_after: 9", 4, "it is for a server with a command"),
        (f"{COMMAND}\n    comand: x", 4, "there is no such key; did you mean command?"),
        (f"{COMMAND}\n    xyz: x", 4, "there is no such key; there are command, url"),
    ],
)
def test_a_mistake_in_an_entry(tmp_path, entry, line, said):
    ((at, text),) = problems(tmp_path, f"models:\n  a:\n    {entry}\n")
    assert at == line
    assert said in text
    assert text.startswith("models.a")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "there is no mapping models; write models: and below it NAME:"),
        ("models: [a]", 1, "there is no mapping models"),
        ("a: 1", 1, "there is no mapping models"),
        ("models: {}", 1, "models: no model is there"),
        ("models:\n  a: http://x", 2, "models.a: 'http://x': write command: or url: below it"),
        ("models:\n  7: {url: 'http://a:1'}", 2, "7 is no string; put it in quotes"),
        ("models:\n  '': {url: 'http://a:1'}", 2, "a name has 1 to 200 characters"),
        ("models:\n  a: {}\n  a: {}", 3, "'a' is already in line 2; remove one of the two"),
        ("models:\n  a: {url: x, url: y}", 2, "'url' is already in line 2"),
        ("models:\n  a: b: c", 2, "is not YAML: mapping values are not allowed here"),
        ("models:\n  a: [", 2, "is not YAML"),
        ("models:\n  a: {url: 'http://a:1'}\n  yes: {url: 'http://b:1'}", 3, "True is no string"),
        ("models:\n  a: {url: 'http://a:1'}\n  010: {url: 'http://b:1'}", 3, "8 is no string"),
        ("models:\n  a: {url: 'http://a:1'}\n  null: {url: 'http://b:1'}", 3, "None is no string"),
        ("models:\n  a:\n    url: 2020-13-01", 3, "is not YAML: month must be in 1..12"),
        ("models: !!python/object:os.system {}", 1, "is not YAML"),
        ("models: &m\n  a: *m", 1, "is nested too deeply, or within itself"),
        ("[" * 5000, 1, "is nested too deeply"),
    ],
)
def test_a_mistake_in_the_file(tmp_path, text, line, said):
    found = problems(tmp_path, text)
    assert (found[0][0], said in found[0][1]) == (line, True), found


def test_a_level_of_the_command_line_may_not_go_with_a_deep_sleep(tmp_path):
    file = write(tmp_path, f"models:\n  a:\n    {COMMAND}\n    deep_sleep: disk\n")
    assert load(file, None).entries[0].model.deep_sleep == "disk"
    with pytest.raises(Invalid, match="--level is 2, so each sleep is deep; remove it, or"):
        load(file, None, level=2)


ONE = "models:\n  a: {url: 'http://a:1'}\n  b: {url: 'http://b:1'}\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("max_awake: 0", 4, "max_awake: 0: write how many may be awake on a device, or fit"),
        ("max_awake: true", 4, "True: write how many"),
        ("max_awake: all", 4, "'all': write how many"),
        ("groups: [a]", 4, "groups: ['a']: write NAME: and members: below it"),
        ("groups:\n  g: [a]", 5, "groups.g: ['a']: write members: below it"),
        ("groups:\n  g: {swap: true}", 5, "groups.g.members: there is no members; write it"),
        ("groups:\n  g:\n    members: [a]", 5, "it changes nothing; write swap, exclusive or"),
        ("groups:\n  g:\n    members: [a]\n    swap: 1", 7, "1: write true or false"),
        ("groups:\n  g:\n    members: [a]\n    swop: true", 7, "did you mean swap?"),
        ("groups:\n  g: {swap: true, members: a}", 5, "'a': write a list of names"),
        ("groups:\n  g: {swap: true, members: [c]}", 5, "there is no model 'c'; write a name"),
        ("groups:\n  g: {swap: true, members: [a, a]}", 5, "'a' is also in 'g'; remove one"),
        ("groups:\n  7: {swap: true, members: [a]}", 5, "7 is no string; put it in quotes"),
        (
            "groups:\n  g: {swap: true, members: [a]}\n  h:\n    swap: true\n    members:\n"
            "      - b\n      - a",
            10,
            "groups.h.members.1: 'a' is also in 'g'",
        ),
    ],
)
def test_a_mistake_beside_the_models(tmp_path, text, line, said):
    found = problems(tmp_path, f"{ONE}{text}\n")
    assert (found[0][0], said in found[0][1]) == (line, True), found


def test_a_file_that_cannot_be_read(tmp_path):
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(Invalid, match=f"{path}:1: cannot be read: {said}"):
            load(str(path), None)
    file = tmp_path / "models.yaml"
    file.write_bytes(b"models:\n  a: \xff")
    with pytest.raises(Invalid, match=r"models\.yaml:2: is not UTF-8"):
        load(str(file), None)


def test_a_key_s_file_that_others_can_read(tmp_path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o644)
    ((line, text),) = problems(
        tmp_path, "models:\n  a:\n    url: http://a:1\n    admin_key_file: key"
    )
    assert line == 4 and "chmod 600" in text and KEY not in text


@pytest.mark.parametrize(
    "entry",
    [
        f"url: 'http://me:{KEY}@h:1'",
        f"url: http://a:1\n    admin: http://me:{KEY}@h:1",
        f"command: [serve, {{--hf-token: {KEY}}}]",
        f"url: http://a:1\n    admin_key_file: {KEY}",
    ],
)
def test_no_mistake_shows_a_secret(tmp_path, entry):
    ((_, text),) = problems(tmp_path, f"models:\n  a:\n    {entry}\n")
    assert KEY not in text


def test_names_are_those_of_one_model(tmp_path):
    text = "models:\n  a: {url: 'http://a:1', aliases: [b]}\n  b: {url: 'http://b:1'}\n"
    assert problems(tmp_path, text) == [
        (3, "models.b: the name 'b' is also that of models.a.aliases.0; choose another")
    ]


def test_a_url_is_that_of_one_model(tmp_path):
    text = "models:\n  a: {url: 'http://a:1'}\n  b:\n    url: http://a:1/\n"
    said = "models.b.url: 'http://a:1' is also that of models.a; remove one of the two"
    assert problems(tmp_path, text) == [(4, said)]


def test_what_needs_another_process():
    """Other settings change while the server runs."""

    def identity(key: str | None = KEY, **changes: object) -> str:
        entry = {"command": ["serve", "${PORT}"], "env": {"A": "b"}, "devices": 0, **changes}
        return Model.model_validate(entry).identity(key)

    same = identity()
    assert same == identity(command="serve ${PORT}", level=2, aliases=["x"], preload=True)
    changed = (
        *(identity(env={"A": "c"}), identity(devices=1), identity(key=None)),
        *(identity(command="serve ${PORT} -v"), identity(key=KEY + "x")),
    )
    assert len({same, *changed}) == 6
    assert KEY not in same


def test_a_command_may_say_its_share_of_the_device():
    def share(words: str) -> float | None:
        return Model(command=f"serve ${{PORT}} {words}").memory_share

    assert share("--gpu-memory-utilization 0.4") == share("--gpu_memory_utilization=.4 -x") == 0.4
    assert share("--gpu-memory-utilization 0.4 --gpu-memory-utilization 0.3") == 0.3
    assert share("") is None
    assert Model(url="http://a:1").memory_share is None


def test_a_command_is_shown_without_keys():
    command = ["serve", "--port", "${PORT}", "--hf-token", "abc", "--ssl-key=def", "--tokenizer=x"]
    assert Model(command=command).shown() == (
        "serve --port ${PORT} --hf-token *** --ssl-key=*** --tokenizer=x"
    )
    within = Model(command=["sh", "-c", "serve --hf-token abc --ssl_key=def ${PORT}"])
    assert within.shown() == "sh -c serve --hf-token *** --ssl_key=*** ${PORT}"
    long = [
        "--hf-token",
        "abcdefgh",
        "--ssl-key=ijklmnop1",
        "-c",
        "x --api_token qrstuvwx -v",
        "--t=y",
    ]
    assert Model(command=long).secrets() == ["ijklmnop1", *sorted(["abcdefgh", "qrstuvwx"])]
    stop = Model(command=["serve"], stop_command=["halt", "--token", "abcdefgh"])
    assert stop.secrets() == ["abcdefgh"]
    environment = {"HF_TOKEN": "0123456789", "TOKENS": "9876543210", "KEY": "1"}
    assert secrets(environment) == ["0123456789"]


def test_the_example():
    done = check(str(ROOT / "examples" / "models.yaml"))
    assert done.returncode == 0, done.stdout


def test_the_guide(tmp_path):
    """Its example has no mistake, and its table all keys, with their defaults."""
    guide = (ROOT / "docs" / "guide.md").read_text()
    (example,) = re.findall(r"^```yaml\n(models:.*?)^```$", guide, flags=re.S | re.M)
    entries = load(write(tmp_path, example), None).entries
    assert [entry.name for entry in entries] == ["small", "elsewhere"]
    section = guide.partition("### Servers that the proxy starts")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section.partition("- **")[0], flags=re.M))
    assert list(rows) == list(Model.model_fields)
    for name in ("start_timeout_s", "stop_timeout_s"):
        assert f"({Model.model_fields[name].default:g})" in rows[name]
