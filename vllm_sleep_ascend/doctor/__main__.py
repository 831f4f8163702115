# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_sleep_ascend.doctor``; needs only the standard library."""

import argparse
import sys

from vllm_sleep_ascend.doctor import command


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm-sleep doctor", description=command.HELP)
    command.add_arguments(parser)
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
