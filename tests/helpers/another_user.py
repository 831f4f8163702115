# SPDX-License-Identifier: Apache-2.0
"""What another user of this machine gets from a port or a socket. Only root can find out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = 65534
_PROGRAM = """
import os, socket, sys
os.setgroups([]); os.setgid({user}); os.setuid({user})
kind, where = sys.argv[1:]
family = socket.AF_UNIX if kind == "socket" else socket.AF_INET
with socket.socket(family) as client:
    try:
        client.connect(where if kind == "socket" else ("127.0.0.1", int(where)))
    except PermissionError:
        sys.exit("not permitted")
    client.sendall(sys.stdin.buffer.read())
    while part := client.recv(65536):
        sys.stdout.buffer.write(part)
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def ask(where: int | Path, request: bytes) -> str:
    """The answer to its request, or why it cannot connect."""
    kind = "port" if isinstance(where, int) else "socket"
    program = _PROGRAM.format(user=NOBODY)
    done = subprocess.run(
        [sys.executable, "-c", program, kind, str(where)],
        input=request,
        capture_output=True,
        timeout=120,
    )
    return (done.stdout or done.stderr).decode().strip()
