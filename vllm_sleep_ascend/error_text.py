# SPDX-License-Identifier: Apache-2.0
"""An error's type, written into its text and read from it again.

Only the text of an error reaches another process of vLLM. The side that it leaves writes the type
in front (``HostOutOfMemoryError: ...``), vLLM puts a sentence of its own around it, and the side
that it reaches gets the error as it was raised.
"""

import re

from vllm_sleep_ascend import errors

_FROM_RANK = re.compile(r"Worker failed with error '(.*)', please check .*", re.DOTALL)
_FROM_ENGINE = re.compile(r"Call to \w+ method failed: (.*)", re.DOTALL)
_TYPED = re.compile(r"(\w+): (.*)", re.DOTALL)


def type_named(name: str) -> type[Exception] | None:
    """The type of an error that crosses processes: one of this package's, or ValueError."""
    if name == ValueError.__name__:
        return ValueError
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, errors.SleepModeError) else None


def write_type(error: Exception) -> None:
    """Put the error's type in front of its text, once. A subclass counts as what it is one of; an
    error of another type stays as it is, and without a text has its type for one."""
    names = (kind.__name__ for kind in type(error).__mro__)
    name = next(filter(type_named, names), None)
    if name is not None and not str(error).startswith(f"{name}: "):
        error.args = (f"{name}: {error}",)
    elif name is None and not str(error):
        error.args = (type(error).__name__,)


def restored(error: BaseException, otherwise: type[Exception] | None = None) -> BaseException:
    """The error as it was raised in the process that it comes from.

    ``otherwise`` is the type of one that comes from an engine's process and names none. Without it,
    such an error is given as it is, like one that comes from no other process.
    """
    text = str(error)
    from_engine = _FROM_ENGINE.fullmatch(text)
    text = from_engine[1] if from_engine else text
    from_rank = _FROM_RANK.fullmatch(text)
    text = from_rank[1] if from_rank else text
    typed = _TYPED.fullmatch(text)
    kind = type_named(typed[1]) if typed else None
    if typed is None or kind is None:
        return otherwise(text) if from_engine and otherwise is not None else error
    if from_engine or from_rank:
        return kind(typed[2])
    if isinstance(error, kind):  # written, and then caught in the same process
        error.args = (typed[2],)
    return error
