# SPDX-License-Identifier: Apache-2.0
"""The cost model against the simulator with a throttled link."""

import os
import subprocess
import sys

from support import ROOT

LINK_GBPS = 0.1
CODE = """
import sys, time, torch, torch_npu
from vllm_sleep_ascend import _camem, pool
torch.npu.set_device(0)
_camem.configure(chunk_bytes=8 << 20, keep_host_backup=True, copy_threads=2, pin_threads=2)
with pool.use_pool("weights"):
    weights = torch.ones(64 << 20, dtype=torch.uint8, device="npu")
torch.npu.synchronize()
actions = {"weights": "offload"}
_camem.sleep(actions), _camem.wake(["weights"])
print(_camem.sleep(actions)["seconds"], _camem.wake(["weights"])["seconds"])
"""


def test_a_throttled_link_takes_what_the_model_says():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from cost_model import Host

    expected = Host(link=LINK_GBPS, memory=1e3, pin=1e3).copy_s((64 << 20) / 1e9, 1)
    environment = {**os.environ, "NPU_SIM_LINK_GBPS": str(LINK_GBPS)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sleep_s, wake_s = map(float, done.stdout.split()[-2:])
    for seconds in (sleep_s, wake_s):  # the host's own copies come on top, on a busy machine more
        assert 0.95 * expected <= seconds <= 1.6 * expected
