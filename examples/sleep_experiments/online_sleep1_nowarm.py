# SPDX-License-Identifier: Apache-2.0
"""Experiment 3: sleep mode with and without one token of warm-up before the first sleep.

python online_sleep1_nowarm.py sleep1 > out_info_sleep1.log 2>&1
python online_sleep1_nowarm.py nowarmup > out_info_nowarmup.log 2>&1
"""

import sys

from harness import Arm, main

ARMS = {"sleep1": Arm(level=1), "nowarmup": Arm(level=1, warmup=False)}

if __name__ == "__main__":
    sys.exit(main(__doc__, "sleep1_nowarm", ARMS))
