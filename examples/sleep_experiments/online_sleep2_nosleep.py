# SPDX-License-Identifier: Apache-2.0
"""Experiment 5: level 2 (wake and load the weights again) against unloading each model.

python online_sleep2_nosleep.py sleep2 > out_info_sleep2.log 2>&1
python online_sleep2_nosleep.py nosleep > out_info_nosleep.log 2>&1
"""

import sys

from harness import Arm, main

ARMS = {"sleep2": Arm(level=2), "nosleep": Arm(level=None)}

if __name__ == "__main__":
    sys.exit(main(__doc__, "sleep2_nosleep", ARMS))
