# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own sleep and wake: prints the memory after each step as JSON.

python -m helpers.own_sleep MODEL LEVEL

Run it in a separate process, because vllm-ascend allows one engine with sleep mode in each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.ascend_engine import engine
from helpers.engine import driver_worker, tokens


def run(model: Path, level: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with engine(model, enable_sleep_mode=True) as llm:
        from vllm_ascend.device_allocator.camem import CaMemAllocator

        network = driver_worker(llm).model_runner.model
        seen["tokens"] = tokens(llm)
        seen["pool"] = CaMemAllocator.get_instance().get_current_usage()
        seen["free awake"] = torch.npu.mem_get_info()[0]
        shapes = {name: weight.shape for name, weight in network.named_parameters()}
        llm.sleep(level=level)
        seen["free asleep"] = torch.npu.mem_get_info()[0]
        llm.wake_up(tags=["weights"])
        if level == 2:  # vllm-ascend has no reload_weights
            network.load_weights(load_file(model / "model.safetensors").items())
        llm.wake_up(tags=["kv_cache"])
        seen["free again"] = torch.npu.mem_get_info()[0]
        turned = {n for n, weight in network.named_parameters() if weight.shape != shapes[n]}
        seen["turned"] = sorted({name.split(".")[-1] for name in turned})
        try:
            seen["tokens again"] = tokens(llm)
        except Exception as error:
            seen["error"] = str(error)
    return seen


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
