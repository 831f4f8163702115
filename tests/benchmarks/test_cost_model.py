# SPDX-License-Identifier: Apache-2.0
"""The cost model compared with the simulator with a throttled link."""

import os
import subprocess
import sys

from helpers import ROOT

LINK_GBPS = 0.1
CODE = """
import sys, time, torch, torch_npu
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.memory import pool
torch.npu.set_device(0)
_camem.configure(chunk_bytes=8 << 20, keep_host_backup=True, copy_threads=2, host_threads=2)
with pool.use_pool("weights"):
    weights = torch.ones(64 << 20, dtype=torch.uint8, device="npu")
torch.npu.synchronize()
actions = {"weights": "offload"}
_camem.sleep(actions), _camem.wake(["weights"])
cycles = [(_camem.sleep(actions)["seconds"], _camem.wake(["weights"])["seconds"])]
while max(map(min, zip(*cycles))) > float(sys.argv[1]) and len(cycles) < 30:
    cycles.append((_camem.sleep(actions)["seconds"], _camem.wake(["weights"])["seconds"]))
print(*map(min, zip(*cycles)))
"""


def test_a_throttled_link_takes_what_the_model_says():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from cost_model import Host

    expected = Host(link=LINK_GBPS, memory=1e3, pin=1e3).copy_s((64 << 20) / 1e9, 1)
    environment = {**os.environ, "NPU_SIM_LINK_GBPS": str(LINK_GBPS)}
    command = [sys.executable, "-c", CODE, str(1.3 * expected)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for seconds in map(float, done.stdout.split()[-2:]):
        # None is faster. Copies in host memory add to the time, more so on a busy machine.
        assert 0.95 * expected <= seconds <= 1.3 * expected


def test_the_guides_have_the_table_of_tiers() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "cost_model.py"), "--tiers"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    heading, line, *rows = table.splitlines()
    assert len(rows) == 5
    for guide, rows_of in {"guide.md": [heading, line, *rows], "guide.zh.md": rows}.items():
        assert "\n".join(rows_of) in (ROOT / "docs" / guide).read_text()


def test_the_slower_of_link_and_disk_decides() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from cost_model import Host

    host = Host(link=25, memory=100, pin=1)
    assert host.disk_s(50, 1, disk=5) == 10
    assert host.disk_s(50, 1, disk=50) == host.copy_s(50, 1) == 2
    assert host.disk_s(50, 4, disk=5) == 10  # the ranks of a host share it
