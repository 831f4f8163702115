# SPDX-License-Identifier: Apache-2.0
"""How a method of vLLM's gets a check in front of it."""

from collections.abc import Callable
from functools import wraps

_MARK = "guarded_by_camem"


def wrap(owner: type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace the method by ``wrapper(method)``, once for each class, in a vLLM that has it."""
    stock = getattr(owner, name, None)
    if stock is None:
        return
    if not hasattr(vars(owner).get(name), _MARK):
        wrapped = wraps(stock)(wrapper(stock))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)
