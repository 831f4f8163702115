# SPDX-License-Identifier: Apache-2.0
"""YAML with the line of every value, and what is wrong with it as YAML."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]
"""A value: the keys and the positions in lists that lead to it."""


@dataclass(frozen=True)
class Problem:
    """Something wrong in a file, and what to do about it."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class Invalid(ValueError):
    """A file with problems; the text has a line for each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line)
        super().__init__("\n".join(map(str, self.problems)))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Says of each value that it cannot construct where it is."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # such as a 13th month
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from None


class Document:
    """A file's ``content``.

    Raises:
        Invalid: it cannot be read, is not YAML, or has a key twice.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.content: object = None
        self._lines: dict[tuple[str, ...], int] = {(): 1}
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise self._invalid(0, f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n")
            raise self._invalid(line, "is not UTF-8") from None
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            twice = [] if node is None else list(_keys_twice(node))
            if twice:
                raise Invalid([Problem(file, line, text) for line, text in twice])
            if node is not None:
                self.content = loader.construct_document(node)
                self._locate(loader, node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            text = " ".join(filter(None, (error.context, error.problem)))
            raise self._invalid(mark.line if mark else 0, f"is not YAML: {text}") from None
        except RecursionError:
            raise self._invalid(0, "is nested too deeply, or within itself") from None
        except (yaml.YAMLError, ValueError) as error:
            if isinstance(error, Invalid):
                raise
            text = str(error) or type(error).__name__
            raise self._invalid(0, f"is not YAML: {text.splitlines()[0]}") from None
        finally:
            loader.dispose()

    def problem(self, place: Place, text: str) -> Problem:
        """A problem with the value there, or with what has it, if it has no line."""
        found = tuple(map(str, place))
        while found not in self._lines:
            found = found[:-1]
        name = ".".join(map(str, place))
        return Problem(self.file, self._lines[found], f"{name}: {text}" if name else text)

    def _invalid(self, line: int, text: str) -> Invalid:
        return Invalid([Problem(self.file, line + 1, text)])

    def _locate(self, loader: yaml.SafeLoader, node: yaml.Node, place: tuple[str, ...]) -> None:
        self._lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                # As in the content: YAML reads yes as True, and 010 as 8.
                below = (*place, str(loader.construct_object(key, deep=True)))
                self._lines[below] = key.start_mark.line + 1
                self._locate(loader, value, below)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self._locate(loader, value, (*place, str(number)))


def _keys_twice(node: yaml.Node) -> Iterator[tuple[int, str]]:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield line, f"{name!r} is already in line {lines[name]}; remove one of the two"
            lines.setdefault(name, line)
            yield from _keys_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys_twice(value)
