# SPDX-License-Identifier: Apache-2.0
"""Experiment 3: sleep mode with and without one token of warm-up before the first sleep.

python online_sleep1_nowarm.py sleep1 > out_info_sleep1.log 2>&1
python online_sleep1_nowarm.py nowarmup > out_info_nowarmup.log 2>&1
"""

import sys

from harness import parser, run


def main() -> int:
    arguments = parser(__doc__.split("\n")[0])
    arguments.add_argument("arm", choices=["sleep1", "nowarmup"])
    args = arguments.parse_args()
    return run(args, "sleep1_nowarm", args.arm, level=1, warmup=args.arm == "sleep1")


if __name__ == "__main__":
    sys.exit(main())
