# SPDX-License-Identifier: Apache-2.0
"""Free ports of the loopback interface.

A server binds its port long after it was chosen, so none is taken from which the system gives
outgoing connections theirs, and which one is chosen does not follow from the seed of this process.
"""

import os
import random
import socket
from pathlib import Path

_LOWEST = 20000
_HIGHEST = 65535
_LISTENS = "0A"  # the state of a socket in /proc/net/tcp


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def strangers(port: int) -> set[int]:
    """Other users whose sockets listen on the port; those of root are trusted."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", table).read_text().splitlines()[1:]
        except FileNotFoundError:  # without IPv6
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(int(fields[7]))
    return found - {0, os.geteuid()}


def free(taken: set[int]) -> int:
    """A free port that is not one of ``taken``.

    Raises:
        OSError: there is none.
    """
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    fixed = [port for port in range(_LOWEST, _HIGHEST + 1) if not low <= port <= high]
    for ports in (fixed, range(_LOWEST, _HIGHEST + 1)):
        for port in random.Random().sample(ports, len(ports)):  # seeded by the system
            if port not in taken and is_free(port):
                return port
    raise OSError(f"no port from {_LOWEST} on is free on the loopback interface")
