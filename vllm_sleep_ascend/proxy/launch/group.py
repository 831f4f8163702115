# SPDX-License-Identifier: Apache-2.0
"""A process group that the proxy has started, also of an earlier proxy.

A number of a process can be used again, so a process is known by its number, the time of its start
and the boot of the system. No other process gets a signal.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

_LOOK_S = 0.1  # seconds between two looks at a group that ends
_GATE = Path(__file__).with_name("gate.py")


class _Stat(NamedTuple):
    """Of /proc/PID/stat."""

    state: str
    group: int
    session: int
    threads: int
    started: int  # in ticks since the boot

    @property
    def has_ended(self) -> bool:
        """A zombie whose threads still end has memory and devices yet."""
        return self.state in "ZX" and self.threads <= 1


def _stat(pid: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return _Stat(fields[0].decode(), *(int(fields[n]) for n in (2, 3, 17, 19)))
    except (FileNotFoundError, ProcessLookupError, PermissionError, IndexError):
        return None  # no such process, or one that is hidden from us


@cache
def boot() -> str:
    """The boot of the system."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Leader:
    """The first process of a group."""

    pid: int
    started: int
    boot: str


class Group:
    """The group of ``leader``; ``child`` if this process has started it."""

    def __init__(self, leader: Leader, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.leader = leader
        self._child = child

    @classmethod
    def prepare(cls, command: list[str], environment: dict[str, str], log: int) -> "Group":
        """A group that runs the command after ``go``; its output goes to the descriptor ``log``."""
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GATE), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            found = _stat(child.pid)
            assert found is not None  # a child is there until it is waited for
            return cls(Leader(child.pid, found.started, boot()), child)
        except BaseException:
            child.kill()
            child.communicate()
            raise

    def go(self) -> None:
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._child.stdin as stdin:
            stdin.write(b"\n")

    def cancel(self) -> None:
        """In place of ``go``."""
        assert self._child is not None and self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def is_running(self) -> bool:
        """Whether its leader runs."""
        if self._child is not None:  # a zombie whose threads still end has no exit code yet
            return self._child.poll() is None
        found = self._found()
        return found is not None and not found.has_ended

    def end(self) -> str:
        """How its leader has ended."""
        code = None if self._child is None else self._child.poll()
        if code is None:
            return "has ended"
        if code >= 0:
            return f"has ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"

    def send(self, number: signal.Signals) -> bool:
        """Send all its processes a signal. Returns whether there are any."""
        found = False
        for pid in self._members():
            found |= self._send(pid, number)
        return found

    async def gone(self, timeout_s: float = float("inf"), kill: bool = False) -> bool:
        """Wait until no process of it is left, and return whether that is so. With ``kill``, they
        get SIGKILL. While /proc cannot be read, some may be left."""
        end = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                runs = self.is_running()
                left = self.send(signal.SIGKILL) if kill else self._has_members()
                if not (runs or left):
                    return True
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_LOOK_S)

    def _found(self) -> _Stat | None:
        """The leader, if its number is not another's by now."""
        if self.leader.boot != boot():
            return None
        found = _stat(self.leader.pid)
        return found if found is not None and found.started == self.leader.started else None

    def _has_members(self) -> bool:
        return next(self._members(), None) is not None

    def _members(self) -> Iterator[int]:
        """Numbers of its processes. While there is one, no other group gets its number."""
        if self.leader.boot != boot():
            return
        if _stat(self.leader.pid) is not None and self._found() is None:
            return
        for entry in os.listdir("/proc"):
            if entry.isdigit() and self._has(int(entry)):
                yield int(entry)

    def _has(self, pid: int) -> bool:
        found = _stat(pid)
        return (
            found is not None
            and not found.has_ended
            and found.group == found.session == self.leader.pid
            and found.started >= self.leader.started
        )

    def _send(self, pid: int, number: signal.Signals) -> bool:
        """Send the process the signal, if it is one of the group."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        except (OSError, AttributeError):  # before Linux 5.3
            descriptor = -1
        try:
            if not self._has(pid):  # still, now that the descriptor is of this process
                return False
            if descriptor >= 0:
                signal.pidfd_send_signal(descriptor, number)
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's; it is there all the same
            pass
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True
