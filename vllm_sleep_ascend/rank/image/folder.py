# SPDX-License-Identifier: Apache-2.0
"""The folder that an image is written into, and how it becomes the directory.

- ``.NAME.WORD.saving``: what the ranks write. Whoever gives up renames it to ``.off``, at once and
  for all of them: what is not there any more cannot be published.
- ``.NAME.WORD.publishing``: what one rank has claimed from the others by that name. After an
  exchange with the directory it is the image that was replaced.
- ``.NAME.WORD.replaced``: that image, on a file system that cannot exchange two names, or after a
  rollback that failed. It gets its name back while there is no directory; the next image that has
  become the directory removes it.
- ``.NAME.WORD.off``: being removed, and perhaps not whole any more.

A process holds a lock on what it works with, so that another one can tell what is left of a killed
process. Locks end with the process.
"""

import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.image import manifest
from vllm_sleep_ascend.rank.image.pieces import close, failure

# A child of vLLM's logger, so that its handlers and level apply where it is.
logger = logging.getLogger(f"vllm.{__name__}")

_RENAME_EXCHANGE = 2  # of renameat2
_AT_FDCWD = -100
_WORD = r"[0-9a-f]{8}"


class Folder:
    """One rank's view of it. ``word`` is the same on the ranks of one save."""

    def __init__(self, directory: Path, word: str) -> None:
        self._directory = directory
        self.path = self._beside(word, "saving")
        self._claim, self._aside, self._off = (
            self._beside(word, what) for what in ("publishing", "replaced", "off")
        )
        self._publishes = self._claimed = self._published = False
        self._replaced: Path | None = None  # where the image is that was there before
        self._locks: list[int] = []

    def make(self) -> None:
        """
        Raises:
            ImageError: it cannot be made.
        """
        self._remove_left("saving|off")
        try:
            self.path.mkdir(exist_ok=True)
            self._locks.append(_locked(self.path, fcntl.LOCK_SH))
        except OSError as error:
            raise failure(self.path, "created", error) from error

    def publish(self, replaced: int | None) -> None:
        """Have the directory be this folder; one of the ranks that share it does so. ``replaced``
        is the inode of the image that may be replaced.

        Raises:
            ImageError: another rank has given up, or the directory is not what it was.
        """
        directory, self._publishes = self._directory, True
        try:
            self.path.rename(self._claim)
            self._claimed = True
            if replaced is not None and exists(directory):
                self._locks.append(_locked(directory, fcntl.LOCK_SH))
                if os.fstat(self._locks[-1]).st_ino != replaced or not is_image(directory):
                    raise ImageError(
                        f"{directory} is not the image any more that was there when saving began, "
                        "and stays as it is; save again"
                    )
                self._replaced = _exchange(self._claim, directory, self._aside)
            else:
                self._claim.rename(directory)
            self._published = True
            manifest.sync_directory(directory.parent)
        except OSError as error:
            raise failure(directory, "created", error, self._image_before()) from error

    def finish(self) -> None:
        """Once every rank is done: remove the image that was replaced, and what killed processes
        have left."""
        if not self._published:
            return
        if self._replaced is not None:
            _remove(self._replaced)
        self._remove_left("saving|publishing|replaced|off")

    def roll_back(self) -> str:
        """Leave what was there before. Returns what failed in that, or ``""``."""
        try:
            if self._published:
                return self._take_name_back()
            (self._claim if self._claimed else self.path).rename(self._off)
        except OSError as error:
            if self._published:
                return str(failure(self._directory, "removed again", error, self._image_before()))
            if self._publishes:  # nobody else does
                _remove(self._claim if self._claimed else self.path)
            # If it is not there, another rank was first
        _remove(self._off)
        return ""

    def _take_name_back(self) -> str:
        directory, replaced = self._directory, self._replaced
        try:
            if os.lstat(directory).st_ino != os.fstat(self._locks[0]).st_ino:
                self._put_aside()
                return (
                    f"{directory} is another image by now, and stays as it is{self._image_before()}"
                )
            if replaced is None:
                directory.rename(self._off)
                new = self._off
            else:
                new = _exchange(replaced, directory, self._off)
        except OSError:
            self._put_aside()
            raise
        self._replaced = None
        _remove(new)
        return ""

    def _put_aside(self) -> None:
        """Have the image that was replaced where it can be brought back from."""
        if self._replaced not in (None, self._aside):
            self._replaced = self._replaced.rename(self._aside)

    def _image_before(self) -> str:
        """Where that is, for an error, if it is aside."""
        for path in (self._replaced, self._aside):
            if path is not None and os.path.lexists(path):
                return f"; the image before is in {path}"
        return ""

    def close(self) -> None:
        """Let other processes have the folder."""
        while self._locks:
            close(self._locks.pop())

    def _remove_left(self, what: str) -> None:
        with suppress(OSError):  # a later save tries again
            for left in _beside(self._directory, what):
                if left != self.path:
                    _remove_unlocked(left)

    def _beside(self, word: str, what: str) -> Path:
        return self._directory.with_name(f".{self._directory.name}.{word}.{what}")


def bring_back(directory: Path) -> None:
    """If a process was killed while it replaced an image: give that its name again."""
    if exists(directory):
        return
    for replaced in _beside(directory, "replaced"):
        with suppress(OSError):  # such as locked, or brought back by another rank
            lock = _locked(replaced, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if is_image(replaced):
                    replaced.rename(directory)
                    return
            finally:
                close(lock)


def exists(path: Path) -> bool:
    """Whether something has that name. Says so only if the disk does: ``lexists`` takes each of
    its errors for a no."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def is_image(directory: Path) -> bool:
    """Whether a directory has an image and nothing else."""
    if not (directory / manifest.HEAD).is_file():
        return False
    return all(
        path.name == manifest.HEAD
        or (path.name.startswith("rank-") and path.suffix in (".json", ".weights"))
        for path in directory.iterdir()
    )


def _beside(directory: Path, what: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape('.' + directory.name)}\.{_WORD}\.({what})")
    return [path for path in directory.parent.iterdir() if pattern.fullmatch(path.name)]


def _remove(path: Path) -> None:
    """Under a name from which nothing is brought back: some of it may stay."""
    with suppress(OSError):  # such as none there; rmtree may raise all the same
        path = path.rename(path.with_suffix(".off"))
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        logger.warning("%s could not be removed; the next image of this name removes it", path)


def _remove_unlocked(path: Path) -> None:
    """Unless it is of a process that lives."""
    with suppress(OSError):
        lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            _remove(path)
        finally:
            close(lock)


def _locked(path: Path, how: int) -> int:
    """A descriptor of a directory with this lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        close(descriptor)
        raise
    return descriptor


def _exchange(new: Path, old: Path, aside: Path) -> Path:
    """Have ``old`` be the new folder, at once where the file system can do that. Returns where the
    old one is: at ``new``, or ``aside``."""
    libc = ctypes.CDLL(None, use_errno=True)
    call: Callable[..., int] | None = getattr(libc, "renameat2", None)  # not in every libc
    code = errno.ENOSYS
    if call is not None:
        names, flag = (os.fsencode(new), os.fsencode(old)), ctypes.c_uint(_RENAME_EXCHANGE)
        if not call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag):
            return new
        code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(old))
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    return aside
