# SPDX-License-Identifier: Apache-2.0
"""Experiment 5: level 2 (wake and load the weights again) against unloading each model.

python online_sleep2_nosleep.py sleep2 > out_info_sleep2.log 2>&1
python online_sleep2_nosleep.py nosleep > out_info_nosleep.log 2>&1
"""

import sys

from harness import parser, run

ARMS = {"sleep2": 2, "nosleep": None}


def main() -> int:
    arguments = parser(__doc__.split("\n")[0])
    arguments.add_argument("arm", choices=ARMS)
    args = arguments.parse_args()
    return run(args, "sleep2_nosleep", args.arm, level=ARMS[args.arm])


if __name__ == "__main__":
    sys.exit(main())
