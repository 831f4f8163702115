# SPDX-License-Identifier: Apache-2.0
"""The message of a failed operation about what it could not roll back."""

import pytest

from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.rank.agreement import Agreement, Operation


@pytest.mark.parametrize(
    ("memory", "communicators"), [("unmap failed", ""), ("", "not made"), ("", "")]
)
def test_what_was_not_rolled_back_and_how_it_comes_back(memory: str, communicators: str) -> None:
    def fail() -> None:
        raise SleepModeError("no room")

    operation = Operation("sleep", (fail,), list, lambda: memory, lambda: communicators)
    with pytest.raises(SleepModeError, match="rank 0, device 3: no room") as failed:
        Agreement(0, 1, 3).carry_out(operation)
    text = str(failed.value)
    if not memory + communicators:
        assert text.endswith("no room")
        return
    assert f"not be rolled back (rank 0, device 3: {memory + communicators})" in text
    assert text.endswith("memory comes back with wake_up, and communicators with their next use")
