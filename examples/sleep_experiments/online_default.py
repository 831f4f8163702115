# SPDX-License-Identifier: Apache-2.0
"""Experiment 1: sleep mode (level 1) against unloading and loading each model.

python online_default.py sleep > out_info_sleep.log 2>&1
python online_default.py nosleep > out_info_nosleep.log 2>&1
"""

import sys

from harness import parser, run

ARMS = {"sleep": 1, "nosleep": None}


def main() -> int:
    arguments = parser(__doc__.split("\n")[0])
    arguments.add_argument("arm", choices=ARMS)
    args = arguments.parse_args()
    return run(args, "default", args.arm, level=ARMS[args.arm])


if __name__ == "__main__":
    sys.exit(main())
