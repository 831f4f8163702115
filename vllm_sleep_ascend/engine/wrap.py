# SPDX-License-Identifier: Apache-2.0
"""How a callable of vLLM's is replaced."""

from collections.abc import Callable
from functools import wraps
from typing import Any

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes ours of the stock callable."""

_MARK = "guarded_by_camem"


def wrap(owner: object, name: str, wrapper: Wrapper) -> None:
    """Replace the callable by ``wrapper`` of it, once for each class or module."""
    stock = getattr(owner, name)
    if not hasattr(vars(owner).get(name), _MARK):
        wrapped = wraps(stock)(wrapper(stock))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)
