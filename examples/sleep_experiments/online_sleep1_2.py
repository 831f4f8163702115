# SPDX-License-Identifier: Apache-2.0
"""Experiment 4: level 1 (weights to host memory) against level 2 (weights loaded again).

python online_sleep1_2.py sleep1 > out_info_sleep1.log 2>&1
python online_sleep1_2.py sleep2 > out_info_sleep2.log 2>&1
"""

import sys

from harness import Arm, main

ARMS = {"sleep1": Arm(level=1), "sleep2": Arm(level=2)}

if __name__ == "__main__":
    sys.exit(main(__doc__, "sleep1_2", ARMS))
