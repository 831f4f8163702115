# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own that is killed while a call waits for it."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.async_engine import async_llm
from helpers.engine import engine
from helpers.faults import set_faults
from helpers.patience import wait_for

HELD_COPIES = "aclrtMemcpyAsync:1:delay_ms=600000:*"


@pytest.fixture
def held_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """From this call on no copy ends."""
    rules = tmp_path / "faults"
    rules.touch()
    monkeypatch.setenv("NPU_SIM_FAULTS_FILE", str(rules))
    return lambda: set_faults(rules, HELD_COPIES)


def kill_engine(client: Any) -> None:
    (process,) = client.resources.engine_manager.processes
    process.kill()


@pytest.mark.parametrize("call", ["sleep", "wake_up"])
def test_a_call_of_llm_raises(tiny_model, held_copies, monkeypatch, call) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(tiny_model, enable_sleep_mode=True) as llm:
        if call == "wake_up":
            llm.sleep()
        held_copies()
        client = llm.llm_engine.engine_core

        def kill_meanwhile() -> None:
            try:
                wait_for(lambda: client.utility_results, "the call")
            finally:
                kill_engine(client)

        killer = threading.Thread(target=kill_meanwhile)
        killer.start()
        with pytest.raises(EngineDeadError):
            getattr(llm, call)()
        killer.join()


def test_a_call_of_async_llm_raises(tiny_model, held_copies) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    with contextmanager(async_llm)(tiny_model) as (llm, run):
        held_copies()

        async def sleep() -> None:
            asleep = asyncio.create_task(llm.sleep())
            while not llm.engine_core.utility_results:
                await asyncio.sleep(0.01)
            kill_engine(llm.engine_core)
            await asleep

        with pytest.raises(EngineDeadError):
            run(sleep())
