# SPDX-License-Identifier: Apache-2.0
"""``python -m examples.sleep_experiments report LOG...``"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        sys.exit("usage: python -m examples.sleep_experiments report LOG... [--out FOLDER]")
    sys.path.insert(0, str(Path(__file__).parent))  # As for the scripts of this folder.
    from report import main

    sys.exit(main(sys.argv[2:]))
