# SPDX-License-Identifier: Apache-2.0
"""Becomes the command in its arguments once a line comes on stdin.

By then the proxy has written down this process, so it is found even if the proxy is killed. If the
proxy is killed before, no line comes. The process stays the same, with its time of start.
"""

import os
import signal
import sys

CANNOT_RUN = 127


def main() -> int:
    if not os.read(0, 1):
        return CANNOT_RUN
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a command inherits
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        print(f"cannot run {sys.argv[1]}: {error.strerror}", file=sys.stderr)
    return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
