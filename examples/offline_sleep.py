# SPDX-License-Identifier: Apache-2.0
"""Put a model to sleep and wake it again: memory is freed, and the output stays the same.

python examples/offline_sleep.py MODEL                     # on an NPU
npu-sim python examples/offline_sleep.py MODEL             # on a simulated one
"""

import argparse
import os
import time

import torch
from vllm import LLM, SamplingParams
from vllm.utils.mem_constants import GiB_bytes

os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
os.environ["VLLM_ASCEND_ENABLE_NZ"] = "0"

# What may stay in use besides weights and KV cache: the runtime's and the communicator's memory.
REST_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a model, or its name on the hub")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if value is not None}

    prompt = "How are you?"

    free, total = torch.npu.mem_get_info()
    print(f"Free memory before start: {free / GiB_bytes:.2f} GiB of {total / GiB_bytes:.2f} GiB")
    # record npu memory use baseline in case other process is running
    used_bytes_baseline = total - free

    def used_bytes() -> int:
        free, total = torch.npu.mem_get_info()
        return total - free - used_bytes_baseline

    llm = LLM(**options, enable_sleep_mode=True)
    sampling_params = SamplingParams(temperature=0, max_tokens=10)
    output = llm.generate(prompt, sampling_params)
    print(f"In use awake:  {used_bytes() / GiB_bytes:.3f} GiB")

    start = time.perf_counter()
    llm.sleep(level=1)
    sleep_seconds = time.perf_counter() - start

    asleep_bytes = used_bytes()
    ranks = llm.collective_rpc("sleep_status")
    backup_bytes = sum(tag["host"] for rank in ranks for tag in rank["tags"].values())
    print(f"In use asleep: {asleep_bytes / GiB_bytes:.3f} GiB, slept in {sleep_seconds:.2f} s")
    print(f"Host memory of the backup: {backup_bytes / GiB_bytes:.3f} GiB")
    # now the memory usage should be less than the model weights
    # (0.5B model, 1GiB weights)
    assert asleep_bytes < 1 * GiB_bytes
    # and in fact weights and KV cache should both be gone
    assert asleep_bytes < REST_BYTES

    start = time.perf_counter()
    llm.wake_up()
    wake_seconds = time.perf_counter() - start
    print(f"In use again:  {used_bytes() / GiB_bytes:.3f} GiB, woke in {wake_seconds:.2f} s")
    output2 = llm.generate(prompt, sampling_params)
    print(f"Before sleep: {output[0].outputs[0].text!r}")
    print(f"After waking: {output2[0].outputs[0].text!r}")
    # cmp output
    assert output[0].outputs[0].text == output2[0].outputs[0].text
    assert output[0].outputs[0].token_ids == output2[0].outputs[0].token_ids
    print("The output after sleep is the output before it.")


if __name__ == "__main__":
    main()
