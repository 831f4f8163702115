# SPDX-License-Identifier: Apache-2.0
"""The proxy's folder: a record of each server that it has started, and their logs.

The records name processes that get signals, so nobody else may be able to write there.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_sleep_ascend.proxy.launch.group import Leader

logger = logging.getLogger(__name__)

_RECORD, _LOG = ".json", ".log"
_MAX_BYTES = 1 << 16
_TAIL = 1 << 18  # bytes of a log in which its last lines are looked for


@dataclass(frozen=True)
class Record:
    """A server that was started; ``identity`` is that of its entry in models.yaml, ``slept_at`` the
    level at which it may sleep, 0 for none, and ``stop_command`` a line as for a shell, or ""."""

    name: str
    identity: str
    pid: int
    started: int
    boot: str
    port: int
    admin_port: int
    slept_at: int = 0
    stop_command: str = ""

    @property
    def leader(self) -> Leader:
        return Leader(self.pid, self.started, self.boot)


def default(port: int) -> Path:
    """The folder of a proxy on this port."""
    states = os.environ.get("XDG_STATE_HOME") or ""
    try:
        above = Path(states) if os.path.isabs(states) else Path.home() / ".local" / "state"
    except RuntimeError:
        raise ValueError("there is no home directory; name a folder with --state-dir") from None
    return above / "vllm-sleep-proxy" / str(port)


class State:
    """The folder, which is made, and locked until ``close``.

    Raises:
        ValueError: it cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise ValueError(
                f"the folder {folder} cannot be used: {error.strerror}; name another one with "
                "--state-dir"
            ) from None
        try:
            found = os.fstat(self._folder)
            if found.st_uid != os.geteuid():
                raise ValueError(
                    f"the folder {folder} belongs to user {found.st_uid}; name one with "
                    f"--state-dir that belongs to {os.geteuid()}, who runs this"
                )
            if found.st_mode & 0o077:
                raise ValueError(
                    f"others can use the folder {folder} (mode {stat.S_IMODE(found.st_mode):o}); "
                    "look at what is in it, and chmod 700 it"
                )
            self._lock = self._open("lock", os.O_RDWR | os.O_CREAT)
        except BaseException:
            os.close(self._folder)
            raise
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise ValueError(
                f"another proxy uses the folder {folder}; end it, or name another one with "
                "--state-dir"
            ) from None

    def close(self) -> None:
        os.close(self._lock)
        os.close(self._folder)

    def records(self) -> Iterator[Record]:
        """Those that can be trusted; what is wrong with the others is logged."""
        for file in sorted(os.listdir(self._folder)):
            if file.endswith(_RECORD):
                try:
                    record = _record(self._read(file))
                    if _stem(record.name) + _RECORD != file:
                        raise ValueError(f"it is that of {record.name!r}")
                except (OSError, ValueError, TypeError) as error:
                    reason = getattr(error, "strerror", None) or error
                    logger.warning("%s is no record, and is left: %s", self.folder / file, reason)
                else:
                    yield record

    def write(self, record: Record) -> None:
        file = _stem(record.name) + _RECORD
        new = file + ".new"
        self._remove(new)
        descriptor = self._open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(descriptor, "w") as out:
            json.dump(asdict(record), out)
        os.rename(new, file, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def forget(self, name: str) -> None:
        self._remove(_stem(name) + _RECORD)

    def log(self, name: str) -> Path:
        """The file with a server's output."""
        return self.folder / (_stem(name) + _LOG)

    def new_log(self, name: str) -> int:
        """A descriptor for the output; the log before is kept as one with ``.1``."""
        file = self.log(name).name
        with contextlib.suppress(FileNotFoundError):
            os.rename(file, file + ".1", src_dir_fd=self._folder, dst_dir_fd=self._folder)
        return self._open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def same_log(self, name: str) -> int:
        """A descriptor for more output, after what is there."""
        return self._open(self.log(name).name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def last_line(self, name: str) -> str:
        """Of the log; "" if there is none."""
        lines = self.last_lines(name)
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def last_lines(self, name: str) -> list[str]:
        """All of the log, or what is at its end; none if there is no log."""
        try:
            descriptor = self._open(self.log(name).name, os.O_RDONLY)
        except OSError:
            return []
        with os.fdopen(descriptor, "rb") as file:
            start = max(0, os.fstat(descriptor).st_size - _TAIL)
            file.seek(start)
            lines = file.read(_TAIL).decode(errors="replace").split("\n")
        return lines[1:] if start and len(lines) > 1 else lines  # the first one is a part

    def _open(self, file: str, flags: int) -> int:
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(file, flags, 0o600, dir_fd=self._folder)

    def _read(self, file: str) -> str:
        descriptor = self._open(file, os.O_RDONLY)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no regular file")
            if found.st_uid != os.geteuid():
                raise ValueError(f"it belongs to user {found.st_uid}")
            return os.read(descriptor, _MAX_BYTES).decode()
        finally:
            os.close(descriptor)

    def _remove(self, file: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file, dir_fd=self._folder)


def _record(text: str) -> Record:
    content = json.loads(text)
    record = Record(**content)
    for name, kind in Record.__annotations__.items():
        if type(getattr(record, name)) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
    if record.pid <= 1:
        raise ValueError("its pid is that of no server")
    return record


def _stem(name: str) -> str:
    """A file's name for a model's, without its characters that a file's cannot have."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:60].lstrip(".")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
