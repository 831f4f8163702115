# SPDX-License-Identifier: Apache-2.0
"""Makes ``multiprocessing``'s start method ``spawn`` fork from a server with the imports done.

Adds what the standard library's fork server lacks compared with ``spawn``: the environment of the
parent, and an interpreter that exits properly.
"""

import ctypes
import gc
import os
from multiprocessing import context, spawn
from typing import Any

_ENVIRONMENT = "environment"
_preparation_data, _prepare, _main = spawn.get_preparation_data, spawn.prepare, spawn._main


def _with_environment(name: str) -> dict[str, Any]:
    return {**_preparation_data(name), _ENVIRONMENT: dict(os.environ)}


def _prepare_with_environment(data: dict[str, Any]) -> None:
    set_environment(data.pop(_ENVIRONMENT))
    _prepare(data)


def _run_to_the_end(fd: int, parent_sentinel: int) -> None:
    code = _main(fd, parent_sentinel)
    gc.unfreeze()
    ctypes.pythonapi.Py_Exit(code)  # the fork server would skip exit handlers


def set_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


class _Spawn(context.ForkServerContext):
    _name = "spawn"


def install() -> None:
    """Install it in this process and all that are forked or spawned from it."""
    spawn.get_preparation_data = _with_environment
    spawn.prepare = _prepare_with_environment
    spawn._main = _run_to_the_end
    context._concrete_contexts["spawn"] = _Spawn()
