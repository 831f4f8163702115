# SPDX-License-Identifier: Apache-2.0
"""One model's entry in models.yaml."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Literal, get_args

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from vllm_sleep_ascend import admin_key

PORT, ADMIN_PORT = "${PORT}", "${ADMIN_PORT}"
DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
API_KEY = "VLLM_API_KEY"
DeepSleep = Literal["level-2", "disk"]
STOP_S = 30.0
"""Seconds from SIGTERM to SIGKILL, if its entry does not say, or it has none."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_WORD = r"(?:key|token|secret|password|passwd|credentials?)"
_SECRET = re.compile(rf"(?:^|[-_.]){_SECRET_WORD}$", re.IGNORECASE)
# As vLLM takes it, also in a command within the command.
_API_KEY_OPTION = re.compile(r"(?:^|\s)--api[-_]key(?:$|[\s=])")
_SECRET_WITHIN = re.compile(rf"(--?(?:[\w.-]*[-_.])?{_SECRET_WORD}[\s=]+)(\S+)", re.IGNORECASE)
_MEMORY_SHARE = re.compile(r"--gpu[-_]memory[-_]utilization[\s=]+(\d*\.?\d+)")
_SHORTEST_SECRET = 8  # characters; others say nothing, and are in many texts
_LONGEST_NAME = 200
_LADDER = ("sleep_after", "deep_sleep_after", "stop_after")
_HIGHEST_PRIORITY = 100
_FOR_COMMANDS = (
    *("env", "preload", "start_timeout_s", "stop_command", "stop_timeout_s", "stop_after"),
)


def _command(value: object) -> object:
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"{error}; close it, or write the command as a list") from None
    if not isinstance(value, list | tuple):
        raise ValueError("write a line as for a shell, or a list of the program and its arguments")
    words = [str(word) if type(word) in (int, float) else word for word in value]
    wrong = next((word for word in words if not isinstance(word, str)), None)
    if wrong is not None:
        which, kind = words.index(wrong), type(wrong).__name__
        raise ValueError(f"argument {which} is no string but a {kind}; put it in quotes")
    if not words or not words[0]:
        raise ValueError("it is empty; write the program and its arguments")
    if any("\0" in word for word in words):
        raise ValueError("it has a NUL byte; remove it")
    if not all(map(_is_text, words)):
        raise ValueError("it has half of a pair of surrogates; remove it")
    return tuple(words)


def _environment(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("write a mapping of names to values")
    for name, text in value.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable; use letters, digits and _")
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise ValueError(f"the value of {name} is no string; put it in quotes")
        if "\0" in str(text):
            raise ValueError(f"the value of {name} has a NUL byte; remove it")
        if not _is_text(str(text)):
            raise ValueError(f"the value of {name} has half of a pair of surrogates; remove it")
    return {name: str(text) for name, text in value.items()}


def _is_text(text: str) -> bool:
    """Whether a process can get it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _address(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("write such as http://127.0.0.1:8001")
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL as error:
        raise ValueError(f"{error}; write such as http://127.0.0.1:8001") from None
    if url.scheme not in ("http", "https") or not url.host or url.path != "/" or url.query:
        raise ValueError("it is no server's address; write such as http://127.0.0.1:8001")
    if url.userinfo:
        raise ValueError("it has a password; servers with a key get VLLM_API_KEY")
    return value.rstrip("/")


def _door(value: object) -> object:
    if isinstance(value, str) and value.startswith("unix:/"):
        return value
    try:
        return _address(value)
    except ValueError:
        raise ValueError("write such as http://127.0.0.1:8101 or unix:/run/vllm/admin") from None


def _devices(value: object) -> object:
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(type(one) is not int or one < 0 for one in values):
        raise ValueError("write the numbers of devices, such as 0 or [0, 1]")
    if len(set(values)) < len(values):
        raise ValueError("a device is there twice; remove one of the two")
    return tuple(values)


def _level(value: object) -> object:
    if type(value) is not int or value not in (1, 2):
        raise ValueError("there is no such level; write 1 or 2")
    return value


def _seconds(value: object) -> object:
    if type(value) not in (int, float) or not 0 < float(str(value)) < float("inf"):
        raise ValueError("write seconds, a number above 0")
    return value


def _priority(value: object) -> object:
    if type(value) is not int or abs(value) > _HIGHEST_PRIORITY:
        most = _HIGHEST_PRIORITY
        raise ValueError(f"write a whole number from -{most} to {most}; higher ones come first")
    return value


def _deep_sleep(value: object) -> object:
    if value not in get_args(DeepSleep):
        raise ValueError(f"there is no such sleep; write {' or '.join(get_args(DeepSleep))}")
    return value


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("write true or false")
    return value


def name_problem(value: object) -> str | None:
    """What is wrong with the name of a model."""
    if not isinstance(value, str):
        return f"{value!r} is no string; put it in quotes"
    if not value or not value.isprintable() or len(value) > _LONGEST_NAME:
        return f"a name has 1 to {_LONGEST_NAME} characters that can be printed; choose another"
    return None


def _names(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError("write a list of names")
    for name in value:
        if problem := name_problem(name):
            raise ValueError(problem)
    return tuple(value)


def _file(value: object) -> object:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("write the path of a file")
    return value


Seconds = Annotated[float, BeforeValidator(_seconds)]
Flag = Annotated[StrictBool, BeforeValidator(_boolean)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


def secrets(environment: Mapping[str, str]) -> list[str]:
    """Values that no message shows."""
    return [
        value
        for name, value in environment.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET.search(name)
    ]


class Model(BaseModel):
    """One model, and how it gets its server.

    command: starts the server, with ``${PORT}`` and, for an admin door, ``${ADMIN_PORT}``.
    url: of a server that somebody else starts.
    admin: the address of its admin door.
    admin_key_file: the door's key, in place of the proxy's.
    env: of the command, beside that of the proxy.
    aliases: other names that the server knows (``--served-model-name``).
    devices: which it uses; servers that share one take turns. Not given: all.
    level: of its sleep, in place of ``--level``.
    priority: of its requests, beside those of other models; higher ones come first.
    preload: it starts before the first request.
    start_timeout_s: until it serves.
    wake_timeout_s: that a sleep or a wake may take, in place of ``--timeout-s``.
    stop_command: ends it, in place of SIGTERM; also what a server that died has left behind.
    stop_timeout_s: that it gets from SIGTERM or ``stop_command`` on, before SIGKILL.
    sleep_after: seconds without a request until it sleeps, in place of ``--idle-s``.
    deep_sleep_after: seconds until its sleep is a deep one.
    deep_sleep: at level 2, or with its backup on disk. Also where the host has no memory for it.
    stop_after: seconds until its process ends.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Annotated[tuple[str, ...], BeforeValidator(_command)] | None = None
    url: Annotated[str, BeforeValidator(_address)] | None = None
    admin: Annotated[str, BeforeValidator(_door)] | None = None
    admin_key_file: Annotated[str, BeforeValidator(_file)] | None = None
    env: Annotated[dict[str, str], BeforeValidator(_environment)] = Field(default_factory=dict)
    aliases: Names = ()
    devices: Annotated[tuple[int, ...], BeforeValidator(_devices)] | None = None
    level: Annotated[Literal[1, 2], BeforeValidator(_level)] | None = None
    priority: Annotated[int, BeforeValidator(_priority)] = 0
    preload: Flag = False
    start_timeout_s: Seconds = 1800.0
    wake_timeout_s: Seconds | None = None
    stop_command: Annotated[tuple[str, ...], BeforeValidator(_command)] | None = None
    stop_timeout_s: Seconds = STOP_S
    sleep_after: Seconds | None = None
    deep_sleep_after: Seconds | None = None
    deep_sleep: Annotated[DeepSleep, BeforeValidator(_deep_sleep)] = "level-2"
    stop_after: Seconds | None = None

    def problems(self, level: int) -> Iterator[tuple[str, str]]:
        """Fields that do not go with the others, or with ``--level``, and why."""
        for name in ("deep_sleep_after", "deep_sleep"):
            if name in self.model_fields_set and self.level == 2:
                yield name, "level 2 is there, so each sleep is deep; remove one of the two"
            elif name in self.model_fields_set and (self.level or level) == 2:
                yield name, "--level is 2, so each sleep is deep; remove it, or write level: 1"
        steps = [name for name in _LADDER if getattr(self, name) is not None]
        for above, below in pairwise(steps):
            if getattr(self, above) >= getattr(self, below):
                yield below, f"it is not after {above}; write more than {getattr(self, above):g}"
        if self.command is None:
            for name in _FOR_COMMANDS:
                if name in self.model_fields_set:
                    yield name, "it is for a server with a command, and this one has a url"
            return
        if not any(PORT in word for word in self.command):
            yield "command", f"it has no {PORT}; write --port {PORT}, or how it gets its port"
        for name in ("command", "stop_command"):
            if any(_API_KEY_OPTION.search(word) for word in getattr(self, name) or ()):
                yield name, f"a key there is in lists of processes; write {API_KEY} in env"
        if self.admin is not None and self.has_admin_port:
            yield "admin", f"the command has {ADMIN_PORT} as well; remove one of the two"
        if self.devices is not None and DEVICES in self.env:
            yield "env", f"devices sets {DEVICES}; remove one of the two"
        if admin_key.VARIABLE in self.env:
            yield "env", f"{admin_key.VARIABLE} is the proxy's; name a file in admin_key_file"

    @property
    def has_admin_port(self) -> bool:
        return any(ADMIN_PORT in word for word in self.command or ())

    @property
    def memory_share(self) -> float | None:
        """Which part of each device its server may use, if the command says; of several options the
        last counts."""
        found = _MEMORY_SHARE.findall(" ".join(self.command or ()))
        return float(found[-1]) if found else None

    def words(self, port: int, admin_port: int, stop: bool = False) -> list[str]:
        """The command, or ``stop_command``, with its ports."""
        ports = {PORT: str(port), ADMIN_PORT: str(admin_port)}
        return [
            re.sub(r"\$\{(ADMIN_)?PORT\}", lambda found: ports[found[0]], word)
            for word in (self.stop_command if stop else self.command) or ()
        ]

    def shown(self) -> str:
        """The command for a message, without what may be a secret."""
        return " ".join(shown for shown, _ in _parts(self.command or ()))

    def secrets(self) -> list[str]:
        """What no log shows of the commands, as ``shown`` does not; the longest first."""
        parts = (*_parts(self.command or ()), *_parts(self.stop_command or ()))
        found = {secret for _, hidden in parts for secret in hidden}
        long = (secret for secret in found if len(secret) >= _SHORTEST_SECRET)
        return sorted(long, key=lambda secret: (-len(secret), secret))

    def identity(self, door_key: str | None) -> str:
        """Equal for entries with the same server: another one needs a restart."""
        key = admin_key.digest(door_key).hex() if door_key else None
        server: list[object] = [self.command, self.url, self.admin, sorted(self.env.items()), key]
        if self.command is not None:
            server.append(self.devices)
        return hashlib.sha256(json.dumps(server).encode()).hexdigest()


def _parts(command: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each word of a command as it is shown, and what was left out of it."""
    hide = False
    for word in command:
        option, equals, value = word.partition("=")
        is_secret = option.startswith("-") and _SECRET.search(option) is not None
        if hide and not word.startswith("-"):
            yield "***", [word]
        elif is_secret and equals:
            yield f"{option}=***", [value]
        else:
            within = [found[2] for found in _SECRET_WITHIN.finditer(word)]
            yield _SECRET_WITHIN.sub(r"\1***", word), within
        hide = is_secret and not equals
