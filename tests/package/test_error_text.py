# SPDX-License-Identifier: Apache-2.0
"""Errors cross vLLM's processes as text, and arrive with their type."""

from types import SimpleNamespace
from typing import NoReturn

import pytest
from vllm.v1.engine.core import EngineCoreProc

from vllm_sleep_ascend.engine.refusals import NotServingError
from vllm_sleep_ascend.error_text import restored, write_type
from vllm_sleep_ascend.errors import HostOutOfMemoryError, RankGoneError, SleepModeError


def from_engine(error: Exception) -> Exception:
    """An engine's error as the front end receives it."""

    def fail() -> NoReturn:
        raise error

    output = SimpleNamespace()
    EngineCoreProc._invoke_utility_method("sleep", fail, output, lambda _: None)
    return Exception(output.failure_message)  # as vLLM's client raises it


def from_rank(error: Exception) -> Exception:
    """A rank's error as the engine receives it (see test_rank_answers.py)."""
    text = f"Worker failed with error '{error}', please check the stack trace above for the cause"
    return RuntimeError(text)


class BadLevel(ValueError):
    """A subclass that is unknown in the other process."""


KINDS = {
    HostOutOfMemoryError: HostOutOfMemoryError,
    RankGoneError: RankGoneError,
    ValueError: ValueError,
    BadLevel: ValueError,
    NotServingError: SleepModeError,
}
TEXT = "weights: 3 bytes\nare short (TimeoutError: 5 s)"


@pytest.mark.parametrize("crossing", [from_engine, from_rank])
@pytest.mark.parametrize(("raised", "expected"), KINDS.items())
def test_an_error_keeps_its_type_and_its_text(raised: type, expected: type, crossing) -> None:
    error = raised(TEXT)
    write_type(error)
    write_type(error)  # each process on the way may do it
    arrived = restored(crossing(error), otherwise=RuntimeError)
    assert (type(arrived), str(arrived)) == (expected, TEXT)


def test_an_error_of_a_rank_keeps_its_type_through_the_engine() -> None:
    error = HostOutOfMemoryError("short")
    write_type(error)
    arrived = restored(from_engine(from_rank(error)))
    assert (type(arrived), str(arrived)) == (HostOutOfMemoryError, "short")


def test_an_error_without_a_text_says_its_type() -> None:
    error = TimeoutError()
    write_type(error)
    assert str(restored(from_rank(error))).startswith("Worker failed with error 'TimeoutError', ")


def test_in_one_process_the_error_is_the_same_with_its_figures() -> None:
    error = HostOutOfMemoryError("short")
    error.needed_bytes = 3
    write_type(error)
    assert restored(error) is error
    assert (str(error), error.needed_bytes) == ("short", 3)


@pytest.mark.parametrize("text", ["KeyError: 'x'", "AclErrors: none", "logger: none", "no type"])
def test_an_error_of_another_type_is_of_the_engine_or_stays(text: str) -> None:
    error = KeyError("x")
    write_type(error)
    assert error.args == ("x",)
    crossed = from_engine(RuntimeError(text))
    assert restored(crossed) is crossed
    arrived = restored(crossed, otherwise=SleepModeError)
    assert (type(arrived), str(arrived)) == (SleepModeError, text)
    other = RuntimeError(f"HostOutOfMemoryError: {text}")  # says so, and crossed no process
    assert restored(other, otherwise=SleepModeError) is other
