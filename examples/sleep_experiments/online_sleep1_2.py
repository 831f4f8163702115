# SPDX-License-Identifier: Apache-2.0
"""Experiment 4: level 1 (weights to host memory) against level 2 (weights loaded again).

python online_sleep1_2.py sleep1 > out_info_sleep1.log 2>&1
python online_sleep1_2.py sleep2 > out_info_sleep2.log 2>&1
"""

import sys

from harness import parser, run

ARMS = {"sleep1": 1, "sleep2": 2}


def main() -> int:
    arguments = parser(__doc__.split("\n")[0])
    arguments.add_argument("arm", choices=ARMS)
    args = arguments.parse_args()
    return run(args, "sleep1_2", args.arm, level=ARMS[args.arm])


if __name__ == "__main__":
    sys.exit(main())
