# SPDX-License-Identifier: Apache-2.0
"""Any call of the device fails while an engine sleeps or wakes, torch's own calls included."""

import torch
from helpers.engine import few
from helpers.faults import DRIVER_ERROR, calls_of

from vllm_sleep_ascend.sim import control


def repeat(operation) -> int:
    """Repeat it until it succeeds; returns the number of failures."""
    for failures in range(3):
        try:
            operation()
            return failures
        except Exception:
            control.set_faults("")
    raise AssertionError("it does not succeed")


def test_level_2_survives_any_failed_call(llm, expected):
    # The process uses another device too: a failing call must not leave that one current.
    torch.npu.mem_get_info(1)
    assert few(llm) == expected
    llm.sleep(level=2)
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    operations = {"sleep": lambda: llm.sleep(level=2), "wake": llm.wake_up}
    calls = {name: calls_of(operation) for name, operation in operations.items()}
    llm.collective_rpc("reload_weights")
    failed = 0
    for faulty, names in calls.items():
        for call in dict.fromkeys(names):
            for nth in sorted({1, names.count(call)}):
                for name, operation in operations.items():
                    control.set_faults(f"{call}:{nth}:{DRIVER_ERROR}" if name == faulty else "")
                    failed += repeat(operation)
                    control.set_faults("")
                llm.collective_rpc("reload_weights")
                llm.reset_prefix_cache()
                assert few(llm) == expected, f"{faulty}: {call} failed, the {nth}th time"
    assert failed > 10
