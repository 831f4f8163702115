# SPDX-License-Identifier: Apache-2.0
"""How a simulated operator refuses what it does not take."""


def require(condition: bool, operator: str, problem: str) -> None:
    """
    Raises:
        RuntimeError: not so; names the operator and the problem.
    """
    if not condition:
        raise RuntimeError(f"{operator}: {problem}")
