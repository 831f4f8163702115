# SPDX-License-Identifier: Apache-2.0
"""The program of each rank under torchrun: an ``external_launcher`` engine beside a trainer.

Engine and trainer share a process and the device, as in verl and TRL. Exits with 0 on success.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.engine import driver_worker, few, mapped, start
from helpers.faults import DRIVER_ERROR
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.sim import control

RANK = int(os.environ["RANK"])
SLEEP_FAULTS = ("aclrtUnmapMem", "aclrtSynchronizeDeviceWithTimeout")
WAKE_FAULTS = ("aclrtMapMem", "aclrtMallocPhysical")


class Engine:
    """The engine of this rank. With ``alone``, each rank has a whole model."""

    def __init__(self, model: Path, alone: bool) -> None:
        self.alone = alone
        self.llm = start(
            model,
            enable_sleep_mode=True,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=1 if alone else 2,
            additional_config={"sleep_mode": {"after_level2": "refuse"}},
        )

    def load(self, weights: dict | Iterator, through_rpc: bool = False) -> None:
        """Load weights as verl and TRL do, or through the engine's RPC."""
        named = weights.items() if isinstance(weights, dict) else weights
        if through_rpc:
            self.llm.collective_rpc(lambda worker: worker.model_runner.model.load_weights(named))
        else:
            driver_worker(self.llm).model_runner.model.load_weights(named)

    def cycle(self, weights: dict, through_rpc: bool) -> None:
        self.llm.sleep(level=2)
        assert mapped() == 0
        self.llm.wake_up(tags=["weights"])
        assert mapped("kv_cache") == 0
        self.load(weights, through_rpc)
        assert self.llm.wake_up(tags=["kv_cache"]) is not False
        self.llm.reset_prefix_cache()

    def fails_on_rank_1(self, call: str, operation: Callable[[], Any]) -> None:
        """One call fails on one rank. All ranks of an engine raise; separate engines do not."""
        before = mapped()
        control.set_faults(f"{call}:1:{DRIVER_ERROR}" if RANK == 1 else "")
        try:
            operation()
        except (RuntimeError, SleepModeError) as error:
            assert "rank 1" in str(error), error
            assert RANK == 1 or not self.alone
            assert mapped() == before
        else:
            assert RANK == 0 and self.alone, f"{call} did not fail"
        finally:
            control.set_faults("")


def torn(weights: dict) -> Iterator:
    yield from list(weights.items())[:5]
    raise OSError("the trainer went away")


def main(case: dict[str, Any]) -> None:
    alone = case["alone"]
    if alone:  # the trainer's group, which exists before the engine
        torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,npu:hccl")
    paths = [Path(path) for path in case["models"]]
    weights = [load_file(path / "model.safetensors") for path in paths]
    expected = case["expected"]
    engine = Engine(paths[0], alone)
    llm = engine.llm
    assert few(llm) == expected[0]

    for n in range(1, 6):
        engine.cycle(weights[n % 2], through_rpc=n > 2)
        assert few(llm) == expected[n % 2], n

    enough = 1 if alone else 2  # ranks of one engine can diverge in more ways
    for call in SLEEP_FAULTS[:enough]:
        engine.fails_on_rank_1(call, lambda: llm.sleep(level=2))
        engine.cycle(weights[0], through_rpc=False)
        assert few(llm) == expected[0], call
    for call in WAKE_FAULTS[:enough]:
        llm.sleep(level=1)
        engine.fails_on_rank_1(call, llm.wake_up)
        llm.wake_up()
        assert few(llm) == expected[0], call

    # One rank's load is interrupted: no rank of the engine serves, instead of waiting for that one.
    llm.sleep(level=2)
    llm.wake_up()
    try:
        engine.load(torn(weights[1]) if RANK == 1 else weights[1])
    except OSError:
        assert RANK == 1
    if alone and RANK == 0:
        assert few(llm) == expected[1]
    else:
        try:
            few(llm)
        except SleepModeError as error:
            assert "does not serve yet" in str(error)
        else:
            raise AssertionError("a model without weights was served")
    engine.load(weights[1], through_rpc=True)
    llm.reset_prefix_cache()
    assert few(llm) == expected[1]
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
