# SPDX-License-Identifier: Apache-2.0
"""Experiment 2: sleep mode with weights as they are, and quantised to 8 bits while they load.

python online_fp8.py > out_info.log 2>&1
python online_fp8.py fp8 > out_info_fp8.log 2>&1
"""

import sys

from harness import parser, run

QUANTIZED = ("--quantization", "fp8")


def main() -> int:
    arguments = parser(__doc__.split("\n")[0])
    arguments.add_argument("arm", nargs="?", choices=["nofp8", "fp8"], default="nofp8")
    args = arguments.parse_args()
    options = QUANTIZED if args.arm == "fp8" else ()
    return run(args, "fp8", args.arm, level=1, options=options)


if __name__ == "__main__":
    sys.exit(main())
