# SPDX-License-Identifier: Apache-2.0
"""One model's entry in models.yaml."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Literal

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from vllm_sleep_ascend import admin_key

PORT, ADMIN_PORT = "${PORT}", "${ADMIN_PORT}"
DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
API_KEY = "VLLM_API_KEY"
STOP_S = 30.0
"""Seconds from SIGTERM to SIGKILL, if its entry does not say, or it has none."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_WORD = r"(?:key|token|secret|password|passwd|credentials?)"
_SECRET = re.compile(rf"(?:^|[-_.]){_SECRET_WORD}$", re.IGNORECASE)
# As vLLM takes it, also in a command within the command.
_API_KEY_OPTION = re.compile(r"(?:^|\s)--api[-_]key(?:$|[\s=])")
_SECRET_WITHIN = re.compile(rf"(--?(?:[\w.-]*[-_.])?{_SECRET_WORD}[\s=]+)(\S+)", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; others say nothing, and are in many texts
_LONGEST_NAME = 200
_LADDER = ("sleep_after", "deep_sleep_after", "stop_after")
_FOR_COMMANDS = ("env", "preload", "start_timeout_s", "stop_timeout_s", "stop_after")


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
    preload: it starts before the first request.
    start_timeout_s: until it serves.
    wake_timeout_s: that a sleep or a wake may take, in place of ``--timeout-s``.
    stop_timeout_s: that it gets after SIGTERM, before SIGKILL.
    sleep_after: seconds without a request until it sleeps, in place of ``--idle-s``.
    deep_sleep_after: seconds until its sleep is one at level 2.
    stop_after: seconds until its process ends.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Annotated[tuple[str, ...], BeforeValidator(_command)] | None = None
    url: Annotated[str, BeforeValidator(_address)] | None = None
    admin: Annotated[str, BeforeValidator(_door)] | None = None
    admin_key_file: Annotated[str, BeforeValidator(_file)] | None = None
    env: Annotated[dict[str, str], BeforeValidator(_environment)] = Field(default_factory=dict)
    aliases: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    devices: Annotated[tuple[int, ...], BeforeValidator(_devices)] | None = None
    level: Annotated[Literal[1, 2], BeforeValidator(_level)] | None = None
    preload: Annotated[StrictBool, BeforeValidator(_boolean)] = False
    start_timeout_s: Seconds = 1800.0
    wake_timeout_s: Seconds | None = None
    stop_timeout_s: Seconds = STOP_S
    sleep_after: Seconds | None = None
    deep_sleep_after: Seconds | None = None
    stop_after: Seconds | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Fields that do not go with the others, and why."""
        if self.deep_sleep_after is not None and self.level == 2:
            yield (
                "deep_sleep_after",
                "level 2 is there, so each sleep is deep; remove one of the two",
            )
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
        if any(_API_KEY_OPTION.search(word) for word in self.command):
            yield "command", f"a key there is in lists of processes; write {API_KEY} in env"
        if self.admin is not None and self.has_admin_port:
            yield "admin", f"the command has {ADMIN_PORT} as well; remove one of the two"
        if self.devices is not None and DEVICES in self.env:
            yield "env", f"devices sets {DEVICES}; remove one of the two"
        if admin_key.VARIABLE in self.env:
            yield "env", f"{admin_key.VARIABLE} is the proxy's; name a file in admin_key_file"

    @property
    def has_admin_port(self) -> bool:
        return any(ADMIN_PORT in word for word in self.command or ())

    def words(self, port: int, admin_port: int) -> list[str]:
        """The command with its ports."""
        ports = {PORT: str(port), ADMIN_PORT: str(admin_port)}
        return [
            re.sub(r"\$\{(ADMIN_)?PORT\}", lambda found: ports[found[0]], word)
            for word in self.command or ()
        ]

    def shown(self) -> str:
        """The command for a message, without what may be a secret."""
        return " ".join(shown for shown, _ in self._parts())

    def secrets(self) -> list[str]:
        """What ``shown`` leaves out and no log shows, the longest first."""
        found = {secret for _, hidden in self._parts() for secret in hidden}
        long = (secret for secret in found if len(secret) >= _SHORTEST_SECRET)
        return sorted(long, key=lambda secret: (-len(secret), secret))

    def _parts(self) -> Iterator[tuple[str, list[str]]]:
        """Each word of the command as it is shown, and what was left out of it."""
        hide = False
        for word in self.command or ():
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

    def identity(self, door_key: str | None) -> str:
        """Equal for entries with the same server: another one needs a restart."""
        key = admin_key.digest(door_key).hex() if door_key else None
        server: list[object] = [self.command, self.url, self.admin, sorted(self.env.items()), key]
        if self.command is not None:
            server.append(self.devices)
        return hashlib.sha256(json.dumps(server).encode()).hexdigest()
