# SPDX-License-Identifier: Apache-2.0
"""Reads models.yaml, and says of each problem its line, the value and the remedy."""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.proxy.config.groups import Group, GroupEntry
from vllm_sleep_ascend.proxy.config.lines import Document, Invalid, Place, Problem
from vllm_sleep_ascend.proxy.config.model import DEVICES, Model, name_problem

FIT: Literal["fit"] = "fit"
"""Of ``max_awake``: as many as the devices have bytes for."""

_KEYS = ("models", "max_awake", "groups")
_SHOWN = 60  # characters of a value

_Entry = TypeVar("_Entry", bound=BaseModel)


@dataclass(frozen=True)
class Entry:
    """A model by its name, with the key of its admin door, and its group."""

    name: str
    model: Model
    door_key: str | None
    group: Group | None = None

    @property
    def identity(self) -> str:
        return self.model.identity(self.door_key)

    def environment(self) -> dict[str, str]:
        """The environment of its command and its ``stop_command``."""
        environment = {**os.environ, **self.model.env}
        if self.model.devices is not None:
            environment[DEVICES] = ",".join(map(str, self.model.devices))
        if self.door_key is not None:
            environment[admin_key.VARIABLE] = self.door_key
        return environment


@dataclass(frozen=True)
class Models:
    """The content of models.yaml. ``max_awake`` is None where it does not say."""

    entries: list[Entry]
    max_awake: int | Literal["fit"] | None = None


def load(file: str, door_key: str | None, level: int = 1) -> Models:
    """
    Args:
        door_key: for models without a file of their own.
        level: of sleep, for models that do not say.

    Raises:
        Invalid: with all problems.
    """
    reader = _Reader(Document(file), door_key, level)
    models = reader.models()
    if reader.problems:
        raise Invalid(reader.problems)
    return models


class _Reader:
    """Collects ``problems`` on its way through the entries."""

    def __init__(self, document: Document, door_key: str | None, level: int) -> None:
        self.problems: list[Problem] = []
        self._document, self._door_key, self._level = document, door_key, level
        self._names: dict[str, Place] = {}
        self._urls: dict[str, Place] = {}
        self._groups: dict[str, Group] = {}  # by the names of their members

    def models(self) -> Models:
        """Those that can be told alone."""
        content = self._document.content
        if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
            self._note((), "there is no mapping models; write models: and below it NAME:")
            return Models([])
        if not content["models"]:
            self._note(("models",), "no model is there; write NAME: below it")
        for key in content:
            if key not in _KEYS:
                self._note((str(key),), f"there is no such key; there are {', '.join(_KEYS)}")
        self._read_groups(content.get("groups", {}), content["models"])
        entries = list(self._entries(content["models"]))
        return Models(entries, self._max_awake(content.get("max_awake")))

    def _entries(self, models: dict[object, object]) -> Iterator[Entry]:
        for name, value in models.items():
            place: Place = ("models", str(name))
            self._check_names(name, value, place)
            model = self._model(name, value, place)
            if model is None:
                continue
            self._check_url(model, place)
            for field, text in model.problems(self._level):
                self._note((*place, field), text)
            yield Entry(str(name), model, self._key(model, place), self._groups.get(str(name)))

    def _max_awake(self, value: object) -> int | Literal["fit"] | None:
        if value is None or value == FIT:
            return FIT if value else None
        if type(value) is int and value >= 1:
            return value
        text = f"{_show(value)}: write how many may be awake on a device, or {FIT}"
        self._note(("max_awake",), text)
        return None

    def _read_groups(self, groups: object, models: dict[object, object]) -> None:
        if not isinstance(groups, dict):
            self._note(("groups",), f"{_show(groups)}: write NAME: and members: below it")
            return
        for name, value in groups.items():
            place: Place = ("groups", str(name))
            entry = self._valid(GroupEntry, name, value, place, "members:")
            if entry is None:
                continue
            if not (entry.swap or entry.exclusive or entry.persistent):
                text = "it changes nothing; write swap, exclusive or persistent: true below it"
                self._note(place, text)
            group = Group(name=name, **entry.model_dump())
            for at, member in enumerate(entry.members):
                if member not in models:
                    text = f"there is no model {_show(member)}; write a name below models"
                elif member in self._groups:
                    other = self._groups[member].name
                    text = f"{_show(member)} is also in {_show(other)}; remove one of the two"
                else:
                    self._groups[member] = group
                    continue
                self._note((*place, "members", at), text)

    def _note(self, place: Place, text: str) -> None:
        self.problems.append(self._document.problem(place, text))

    def _model(self, name: object, value: object, place: Place) -> Model | None:
        if isinstance(value, dict) and name_problem(name) is None:
            sources = [key for key in ("command", "url") if value.get(key) is not None]
            if len(sources) != 1:
                found = "both command and url are" if sources else "neither command nor url is"
                self._note((*place, *sources[1:]), f"{found} there; write one of the two")
        return self._valid(Model, name, value, place, "command: or url:")

    def _valid(
        self, kind: type[_Entry], name: object, value: object, place: Place, keys: str
    ) -> _Entry | None:
        """The entry as one of this kind; None after a note of what is wrong."""
        if problem := name_problem(name):
            self._note(place, problem)
            return None
        if not isinstance(value, dict):
            self._note(place, f"{_show(value)}: write {keys} below it")
            return None
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            for each in error.errors():
                self._note((*place, *each["loc"][:1]), _text(dict(each), list(kind.model_fields)))
            return None

    def _check_names(self, name: object, value: object, place: Place) -> None:
        """A name or an alias is that of one model."""
        aliases = value.get("aliases") if isinstance(value, dict) else None
        named: list[tuple[object, Place]] = [(name, place)]
        if isinstance(aliases, list):
            named += [(alias, (*place, "aliases", at)) for at, alias in enumerate(aliases)]
        for known, where in named:
            if not isinstance(known, str):
                continue
            first = self._names.setdefault(known, where)
            if first != where:
                text = f"the name {_show(known)} is also that of {_written(first)}; choose another"
                self._note(where, text)

    def _check_url(self, model: Model, place: Place) -> None:
        if model.url is None:
            return
        first = self._urls.setdefault(model.url, place)
        if first != place:
            text = f"{_show(model.url)} is also that of {_written(first)}; remove one of the two"
            self._note((*place, "url"), text)

    def _key(self, model: Model, place: Place) -> str | None:
        """The key of its admin door."""
        if model.admin_key_file is None:
            return self._door_key
        file = str(Path(self._document.file).parent / model.admin_key_file)
        try:
            return admin_key.read(file)
        except ValueError as error:
            # Without the path: the key itself may have been written there.
            self._note((*place, "admin_key_file"), str(error).replace(file, "the file"))
            return None


def _written(place: Place) -> str:
    return ".".join(map(str, place))


def _text(error: dict[str, object], fields: list[str]) -> str:
    """A validation error, with the value where it has no secret."""
    loc = error["loc"]
    field = str(loc[0]) if isinstance(loc, tuple) and loc else ""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, fields, n=1)
        there = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
        return f"there is no such key; {there}"
    if error["type"] == "missing":
        return f"there is no {field}; write it"
    reason = str(error["msg"]).removeprefix("Value error, ")
    if field in ("env", "command", "stop_command", "admin_key_file"):
        return reason
    value = error["input"]
    return reason if isinstance(value, str) and "@" in value else f"{_show(value)}: {reason}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
