# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of the simulator. They run under `npu-sim`."""

import os
from collections.abc import Iterator

import pytest

# Before the library is loaded: a machine of their own, small enough to fill.
os.environ["NPU_SIM_MACHINE"] = f"sim-tests-{os.getpid()}"
os.environ["NPU_SIM_HBM_GIB"] = "1"
os.environ["NPU_SIM_DEVICES"] = "2"
for name in ("NPU_SIM_FAULTS", "NPU_SIM_FAULTS_FILE", "NPU_SIM_LINK_GBPS"):
    os.environ.pop(name, None)

import ascendcl

from vllm_sleep_ascend.sim import control


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Device 0 in this thread; the test gives back all that it takes."""
    ascendcl.ok("aclrtSetDevice", 0)
    before = control.counters()
    yield
    control.set_faults("")
    ascendcl.ok("aclrtSetDevice", 0)
    assert control.counters() == before
