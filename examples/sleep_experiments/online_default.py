# SPDX-License-Identifier: Apache-2.0
"""Experiment 1: sleep mode (level 1) against unloading and loading each model.

python online_default.py sleep > out_info_sleep.log 2>&1
python online_default.py nosleep > out_info_nosleep.log 2>&1
"""

import sys

from harness import Arm, main

ARMS = {"sleep": Arm(level=1), "nosleep": Arm(level=None)}

if __name__ == "__main__":
    sys.exit(main(__doc__, "default", ARMS))
