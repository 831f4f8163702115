# SPDX-License-Identifier: Apache-2.0
"""Simulated machines that a test chooses, independent of the run's machine."""

import sys

# A prefix: the command after it runs with the simulated CANN that its environment selects.
LAUNCHER = (sys.executable, "-m", "vllm_sleep_ascend.sim.launcher")

# The variables of the default profile (csrc/sim/README.md).
USUAL_MACHINE = dict.fromkeys(
    ("NPU_SIM_KERNEL", "NPU_SIM_DRIVER", "NPU_SIM_CANN", "NPU_SIM_SOC", "NPU_SIM_STREAMS"), ""
)
