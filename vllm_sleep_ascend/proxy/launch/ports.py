# SPDX-License-Identifier: Apache-2.0
"""Free ports of the loopback interface.

A server binds its port long after it was chosen, so none is taken from which the system gives
outgoing connections theirs, and which one is chosen does not follow from the seed of this process.
"""

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LOWEST = 20000
_HIGHEST = 65535
_ESTABLISHED, _LISTENS = "01", "0A"  # states of a socket in /proc/net/tcp

TRUSTED = frozenset({0, os.geteuid()})
"""Users who may get keys and requests."""


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
    sockets = (socket for socket in _sockets() if socket.state == _LISTENS and socket.port == port)
    return {socket.user for socket in sockets} - TRUSTED


def users_of(port: int, peer: int) -> set[int]:
    """Users whose sockets have this port and are connected to the port ``peer``. One that its
    program has closed is no longer any user's, and is left out."""
    wanted = (_ESTABLISHED, port, peer)
    return {socket.user for socket in _sockets() if socket[:3] == wanted}


class _Socket(NamedTuple):
    state: str
    port: int
    peer: int
    user: int


def _sockets() -> Iterator[_Socket]:
    """Those of this network namespace."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", table).read_text().splitlines()[1:]
        except FileNotFoundError:  # without IPv6
            continue
        for fields in map(str.split, lines):
            port, peer = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            yield _Socket(fields[3], port, peer, int(fields[7]))


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
