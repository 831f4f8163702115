# SPDX-License-Identifier: Apache-2.0
"""Replaces a callable of vLLM."""

from collections.abc import Callable
from functools import wraps
from typing import Any

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes our callable from the stock one."""

_MARK = "guarded_by_camem"


def wrap(owner: object, name: str, wrapper: Wrapper) -> None:
    """Replace the callable by ``wrapper`` of it, once per class or module."""
    stock = getattr(owner, name)
    if not hasattr(vars(owner).get(name), _MARK):
        wrapped = wraps(stock)(wrapper(stock))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)
