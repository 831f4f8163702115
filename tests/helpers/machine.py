# SPDX-License-Identifier: Apache-2.0
"""Simulated machines that a test names, whatever machine the run is on."""

import sys

# A command line behind it runs with the simulated CANN that its environment names.
LAUNCHER = (sys.executable, "-m", "vllm_sleep_ascend.sim.launcher")

# The variables of the default profile (csrc/sim/README.md).
USUAL_MACHINE = dict.fromkeys(
    ("NPU_SIM_KERNEL", "NPU_SIM_DRIVER", "NPU_SIM_CANN", "NPU_SIM_SOC", "NPU_SIM_STREAMS"), ""
)
