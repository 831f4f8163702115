# SPDX-License-Identifier: Apache-2.0
"""Runs the command line of a warm process in the fork."""

import ctypes
import os
import runpy
import signal
import socket
import sys
from multiprocessing import connection, forkserver, resource_tracker

from helpers.warm.spawning import set_environment

_PR_SET_PDEATHSIG = 1


def run(command: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Become ``python *command``."""
    _die_with_parent()
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.close(out)
    set_environment(environment)
    os.chdir(folder)
    _spawn_from_here()
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
        runpy.run_path(command[0], run_name="__main__")


def _die_with_parent() -> None:
    """No process outlives the test run, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _spawn_from_here() -> None:
    """Give this process its own fork server, in its group, and a resource tracker."""
    resource_tracker._resource_tracker._fd = None
    resource_tracker._resource_tracker._pid = None
    address = connection.arbitrary_address("AF_UNIX")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive, kept = os.pipe()
    server = os.fork()
    if server == 0:
        try:
            _die_with_parent()
            os.close(kept)
            forkserver.main(listener.detach(), alive, [])
        finally:
            os._exit(0)
    listener.close()
    os.close(alive)
    this = forkserver._forkserver
    this._forkserver_address, this._forkserver_alive_fd = address, kept
    this._forkserver_pid = server
