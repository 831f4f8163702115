# SPDX-License-Identifier: Apache-2.0
"""``python -m examples.sleep_experiments report LOG...``"""

import sys

from .report import main

if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit("usage: python -m examples.sleep_experiments report LOG... [--out FOLDER]")
    sys.exit(main(sys.argv[2:]))
