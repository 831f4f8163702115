# SPDX-License-Identifier: Apache-2.0
"""Reads models.yaml, and says of each problem its line, the value and the remedy."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.proxy.config.lines import Document, Invalid, Place, Problem
from vllm_sleep_ascend.proxy.config.model import Model, name_problem

_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Entry:
    """A model by its name, with the key of its admin door."""

    name: str
    model: Model
    door_key: str | None

    @property
    def identity(self) -> str:
        return self.model.identity(self.door_key)


def load(file: str, door_key: str | None) -> list[Entry]:
    """
    Args:
        door_key: for models without a file of their own.

    Raises:
        Invalid: with all problems.
    """
    document = Document(file)
    entries: list[Entry] = []
    problems = list(_read(document, door_key, entries))
    if problems:
        raise Invalid(problems)
    return entries


def _read(document: Document, door_key: str | None, entries: list[Entry]) -> Iterator[Problem]:
    content = document.content
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        yield document.problem((), "there is no mapping models; write models: and below it NAME:")
        return
    if not content["models"]:
        yield document.problem(("models",), "no model is there; write NAME: below it")
    for key in content:
        if key != "models":
            yield document.problem((str(key),), "there is no such key; all models are in models")
    names: dict[str, Place] = {}
    for name, value in content["models"].items():
        place: Place = ("models", str(name))
        model = None
        if problem := name_problem(name):
            yield document.problem(place, problem)
        elif not isinstance(value, dict):
            yield document.problem(place, f"{_show(value)}: write command: or url: below it")
        else:
            sources = [key for key in ("command", "url") if value.get(key) is not None]
            if len(sources) != 1:
                found = "both command and url are" if sources else "neither command nor url is"
                where = (*place, *sources[1:])
                yield document.problem(where, f"{found} there; write one of the two")
            try:
                model = Model.model_validate(value)
            except ValidationError as error:
                for each in error.errors():
                    yield document.problem((*place, *each["loc"][:1]), _text(dict(each)))
        listed = value.get("aliases") if isinstance(value, dict) else None
        aliases = listed if isinstance(listed, list) else []
        for known, where in [(name, place)] + [
            (alias, (*place, "aliases", number)) for number, alias in enumerate(aliases)
        ]:
            if isinstance(known, str) and known in names:
                of = ".".join(map(str, names[known]))
                text = f"the name {_show(known)} is also that of {of}; choose another"
                yield document.problem(where, text)
            elif isinstance(known, str):
                names[known] = where
        if model is None:
            continue
        for field, text in model.problems():
            yield document.problem((*place, field), text)
        key = door_key
        if model.admin_key_file is not None:
            try:
                key = admin_key.read(str(Path(document.file).parent / model.admin_key_file))
            except ValueError as error:
                yield document.problem((*place, "admin_key_file"), str(error))
        entries.append(Entry(name, model, key))


def _text(error: dict[str, object]) -> str:
    """A validation error, with the value but for the environment's."""
    loc = error["loc"]
    field = str(loc[0]) if isinstance(loc, tuple) and loc else ""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, Model.model_fields, n=1)
        there = f"did you mean {near[0]}?" if near else f"there are {', '.join(Model.model_fields)}"
        return f"there is no such key; {there}"
    reason = str(error["msg"]).removeprefix("Value error, ")
    return reason if field in ("env", "command") else f"{_show(error['input'])}: {reason}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
