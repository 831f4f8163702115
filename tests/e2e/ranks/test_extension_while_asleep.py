# SPDX-License-Identifier: Apache-2.0
"""A worker extension on two ranks, as trainers use it: refused on both while the weights sleep, and
allowed once they are awake, even while the KV cache still sleeps."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers.engine import engine, few
from helpers.ranks import assert_all
from helpers.reference import hf_few
from safetensors.torch import load_file

from vllm_sleep_ascend import safe_while_asleep
from vllm_sleep_ascend.errors import SleepModeError


class Trainer:
    """An extension of both workers (``worker_extension_cls``)."""

    calls = 0

    def update_weights_from(self, path: str) -> list[int]:
        """A collective of both ranks: it would hang if only one refused."""
        Trainer.calls += 1
        self.model_runner.model.load_weights(load_file(path).items())  # type: ignore[attr-defined]
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self.rank)  # type: ignore[attr-defined]
        return ranks

    @safe_while_asleep
    def number_of_calls(self) -> int:
        return Trainer.calls


@pytest.fixture(scope="module")
def ranks(tiny_model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ["PYTHONPATH"]]))
        with engine(
            tiny_model,
            enable_sleep_mode=True,
            distributed_executor_backend="mp",
            tensor_parallel_size=2,
            worker_extension_cls=f"{Path(__file__).stem}.{Trainer.__name__}",
        ) as llm:
            yield llm


def test_an_extension_waits_for_the_weights_and_not_for_the_cache(ranks, tiny_model) -> None:
    expected = hf_few(tiny_model)
    file = str(tiny_model / "model.safetensors")
    for level in (1, 2):
        ranks.sleep(level=level)
        before = ranks.collective_rpc("number_of_calls")
        for call in (
            lambda: ranks.collective_rpc("update_weights_from", args=(file,)),
            lambda: ranks.collective_rpc(lambda worker, path: None, args=(file,)),
            lambda: ranks.apply_model(str),
            lambda: ranks.collective_rpc("execute_model", args=(None,)),
        ):
            with pytest.raises(SleepModeError, match=r"asleep.*call wake_up\("):
                call()
        assert ranks.collective_rpc("number_of_calls") == before
        assert_all(ranks, "SUSPENDED")
        ranks.wake_up(tags=["weights"])
        assert ranks.collective_rpc("update_weights_from", args=(file,)) == [[0, 1], [0, 1]]
        with pytest.raises(SleepModeError, match=r"execute_dummy_batch needs .* \(kv_cache\)"):
            ranks.collective_rpc("execute_dummy_batch")
        ranks.wake_up(tags=["kv_cache"])
        ranks.reset_prefix_cache()
        assert few(ranks) == expected
