# SPDX-License-Identifier: Apache-2.0
"""Experiment 2: sleep mode with unquantised weights, and with weights quantised to 8 bits on load.

python online_fp8.py > out_info.log 2>&1
python online_fp8.py fp8 > out_info_fp8.log 2>&1
"""

import sys

from harness import Arm, main

ARMS = {"nofp8": Arm(level=1), "fp8": Arm(level=1, options=("--quantization", "fp8"))}

if __name__ == "__main__":
    sys.exit(main(__doc__, "fp8", ARMS, default="nofp8"))
