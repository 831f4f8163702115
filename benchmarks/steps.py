# SPDX-License-Identifier: Apache-2.0
"""What one step of an engine costs an NPU's host: launches, waits, copies, work on the AI CPU.

Counted by the simulated device, which knows no times. A decode step is what one more token of a
request costs. A layer is the difference between models that differ in their layers alone. The
platform is the environment's: this package's, or vllm-ascend's.

    npu-sim python benchmarks/steps.py build/models/tiny-qwen2 --out build/results
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAYERS = (4, 8)
PROMPT = [7] * 32
GRAPHS = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]}
COUNTS = (
    "launches",
    "graphs",
    "on_ai_cpu",
    "waits",
    "copies",
    "hidden_copy_bytes",
    "scratch_bytes",
)


def count(model: Path, layers: int, dtype: str, mode: str) -> dict[str, Any]:
    """Costs of a prefill and of a decode step, of one request."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from vllm_sleep_ascend.sim import control

    llm = LLM(
        str(model),
        dtype=dtype,
        load_format="dummy",
        hf_overrides={"num_hidden_layers": layers},
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        enforce_eager=mode == "eager",
        compilation_config=GRAPHS if mode == "graphs" else {},
    )

    def cost_of(tokens: int) -> dict[str, int]:
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        torch.npu.synchronize()
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        control.reset_counters()
        llm.generate([{"prompt_token_ids": PROMPT}], parameters, use_tqdm=False)
        costs = control.costs()
        return {
            "launches": costs.launches,
            "graphs": control.call_count("aclmdlRIExecuteAsync"),
            "on_ai_cpu": costs.on_ai_cpu,
            "waits": costs.waits,
            "copies": control.call_count("aclrtMemcpyAsync") + control.call_count("aclrtMemcpy"),
            "hidden_copy_bytes": costs.hidden_copy_bytes,
            "scratch_bytes": torch.npu.max_memory_allocated() - before,
        }

    cost_of(4)  # what the first request alone costs
    # The first token is the prefill's; what a request costs in the end cancels out.
    first, few, more = cost_of(1), cost_of(4), cost_of(5)
    decode = {name: more[name] - few[name] for name in COUNTS}
    return {
        "platform": type(current_platform).__module__.split(".")[0],
        "prefill": first,
        "decode": {**decode, "scratch_bytes": more["scratch_bytes"]},
    }


def in_a_process(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(options.model), "--dtype", options.dtype]
    command += ["--mode", options.mode]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "NPU_SIM_HBM_GIB": "2", **os.environ}
    done = subprocess.run(
        [*command, "--layers", str(layers)], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"the engine with {layers} layers failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model's folder; its weights are not read")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--mode",
        choices=("default", "eager", "graphs"),
        default="default",
        help="eager: without graphs; graphs: this package's platform with graphs of decode steps",
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON")
    parser.add_argument("--layers", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layers:
        print(json.dumps(count(options.model, options.layers, options.dtype, options.mode)))
        return
    few, many = (in_a_process(options, layers) for layers in LAYERS)
    print(f"{few['platform']}, {options.model.name}, {options.dtype}, mode {options.mode}")
    print(f"| step | {' | '.join(COUNTS)} |\n|---{'|---' * len(COUNTS)}|")
    result = {"platform": few["platform"], "model": options.model.name, "dtype": options.dtype}
    for step in ("prefill", "decode"):
        layer = {
            name: (many[step][name] - few[step][name]) / (LAYERS[1] - LAYERS[0]) for name in COUNTS
        }
        result[step] = {f"of {LAYERS[0]} layers": few[step], "per layer": layer}
        for what, costs in result[step].items():
            print(f"| {step} {what} | {' | '.join(f'{costs[name]:g}' for name in COUNTS)} |")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"steps_{few['platform']}_{options.model.name}_{options.mode}.json"
        (options.out / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
