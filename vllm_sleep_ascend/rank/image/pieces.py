# SPDX-License-Identifier: Apache-2.0
"""A file of bytes in pieces of 8 MiB, each with its SHA-256, and copies between it and memory.

Each of a few threads takes a piece at a time through a block of page-locked memory of its own, so
that several requests are in flight, and the disk, the checksums and the link do not wait for each
other. Requests bypass the page cache (O_DIRECT) where the file system takes that.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import torch

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.memory.checksum import memory_at
from vllm_sleep_ascend.rank.image.tensors import Span

# A child of vLLM's logger, so that its handlers and level apply where it is.
logger = logging.getLogger(f"vllm.{__name__}")

PIECE = 8 << 20
THREADS = 8
_PAGE = 4096  # at least the logical block of any disk

Part = tuple[int, torch.Tensor]  # where it begins in a piece, and its memory as bytes


def file_bytes(size: int) -> int:
    """Bytes of a file for so many: whole blocks of a disk."""
    return -(-size // _PAGE) * _PAGE


def write(path: Path, spans: Sequence[Span], size: int) -> list[str]:
    """Write a file of ``size`` bytes, and wait for the disk. Returns the checksum of each piece.

    Raises:
        ImageError: the disk is full, or failed; names the path and the offset.
    """
    pieces = _parts(spans, size)
    checksums = [""] * len(pieces)
    with _File(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, file_bytes(size)) as file:

        def save(piece: int, block: torch.Tensor) -> None:
            content = file.piece_of(block, piece)
            if sum(part.nbytes for _, part in pieces[piece]) < len(content):
                block.zero_()  # what no tensor covers
            for start, memory in pieces[piece]:
                block[start : start + memory.nbytes].copy_(memory)
            checksums[piece] = hashlib.sha256(content).hexdigest()
            file.write(content, piece * PIECE)

        _on_threads(range(len(pieces)), _device(spans), save)
        file.sync()
    return checksums


def read(path: Path, spans: Sequence[Span], size: int, checksums: Sequence[str]) -> None:
    """Fill memory from a file. No byte of a piece is copied before its checksum is compared.

    Raises:
        ImageError: the file is missing or too short, a piece is not what was written, or the disk
            failed; names the path and the offset.
    """
    pieces = _parts(spans, size)
    with _File(path, os.O_RDONLY, file_bytes(size)) as file:

        def fill(piece: int, block: torch.Tensor) -> None:
            content = file.piece_of(block, piece)
            file.read(content, piece * PIECE)
            found = hashlib.sha256(content).hexdigest()
            if found != checksums[piece]:
                raise ImageError(
                    f"{path} is not what was written: {len(content)} bytes at offset "
                    f"{piece * PIECE} have the SHA-256 {found} instead of {checksums[piece]}; "
                    "save the image again"
                )
            for start, memory in pieces[piece]:
                memory.copy_(block[start : start + memory.nbytes])

        _on_threads([i for i, parts in enumerate(pieces) if parts], _device(spans), fill)


def _parts(spans: Iterable[Span], size: int) -> list[list[Part]]:
    """What each piece of a file consists of."""
    pieces: list[list[Part]] = [[] for _ in range(0, size, PIECE)]
    for span in spans:
        memory = memory_at(span.address, span.bytes, torch.uint8, span.device)
        end = span.offset + span.bytes
        for piece in range(span.offset // PIECE, -(-end // PIECE)):
            base = piece * PIECE
            start, stop = max(span.offset, base), min(end, base + PIECE)
            part = memory[start - span.offset : stop - span.offset]
            pieces[piece].append((start - base, part))
    return pieces


def _device(spans: Iterable[Span]) -> torch.device | None:
    """The device whose link the blocks are page-locked for."""
    return next((span.device for span in spans if span.device.type != "cpu"), None)


def _on_threads(
    pieces: Sequence[int],
    device: torch.device | None,
    work: Callable[[int, torch.Tensor], None],
) -> None:
    """Do the work for each of these pieces. After an error no further one begins."""
    blocks: SimpleQueue[torch.Tensor] = SimpleQueue()
    count = min(THREADS, len(pieces))
    for _ in range(count):
        locked = device is not None
        blocks.put(torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=locked))

    def begin() -> None:
        if device is not None:
            torch.accelerator.set_device_index(device.index)

    @torch.inference_mode()
    def step(piece: int) -> None:
        block = blocks.get()
        try:
            work(piece, block)
        finally:
            blocks.put(block)

    if not count:
        return
    try:
        with ThreadPoolExecutor(count, "image", begin) as pool:
            tasks = [pool.submit(step, piece) for piece in pieces]
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            pool.shutdown(wait=True, cancel_futures=True)
        for task in done:
            task.result()
    finally:
        while not blocks.empty():
            blocks.get()
        if device is not None:
            torch.accelerator.empty_host_cache()  # torch would keep the blocks


class _File:
    """A file of pieces. Raises ImageError with its path, and the offset of a request."""

    def __init__(self, path: Path, flags: int, size: int) -> None:
        self._path, self._size = path, size
        self._fd, self.direct = -1, True
        with self._named("opened"):
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            self._begin(flags)
        except BaseException:
            close(self._fd)
            raise

    def _begin(self, flags: int) -> None:
        if flags & os.O_CREAT:
            with self._named("preallocated"):
                if self._size:
                    os.posix_fallocate(self._fd, 0, self._size)
        else:
            with self._named("read"):
                found = os.fstat(self._fd).st_size
            if found != self._size:
                raise ImageError(
                    f"{self._path} has {found} bytes instead of {self._size}; save the image again"
                )
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags() | os.O_DIRECT)
        except OSError:  # such as on tmpfs
            self._pass_page_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._empty_page_cache(0, 0)
        close(self._fd)

    def piece_of(self, block: torch.Tensor, piece: int) -> memoryview:
        """The part of a block that this piece takes."""
        return block.numpy().data[: self._size - piece * PIECE]

    def write(self, content: memoryview, offset: int) -> None:
        self._transfer("written", os.pwritev, content, offset)

    def read(self, content: memoryview, offset: int) -> None:
        self._transfer("read", os.preadv, content, offset)

    def sync(self) -> None:
        """Wait until the disk has all of it."""
        with self._named("written"):
            os.fsync(self._fd)

    def _transfer(
        self,
        what: str,
        call: Callable[[int, list[memoryview], int], int],
        content: memoryview,
        offset: int,
    ) -> None:
        end = offset + len(content)
        while content:
            at, direct = f"{what} at offset {offset} for {len(content)} bytes", self.direct
            with self._named(at):
                try:
                    count = call(self._fd, [content], offset)
                except OSError as error:
                    if not direct or error.errno not in (errno.EINVAL, errno.EFAULT):
                        raise
                    self._use_page_cache()
                    continue
            self._empty_page_cache(offset, count)
            if count == 0:
                raise ImageError(f"{self._path} ends at {offset} and not at {end}; save it again")
            content, offset = content[count:], offset + count

    def _empty_page_cache(self, offset: int, size: int) -> None:
        """Of so many bytes, or all from there on for 0."""
        if not self.direct:
            with suppress(OSError):
                os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)

    def _use_page_cache(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags() & ~os.O_DIRECT)
        self._pass_page_cache()

    def _pass_page_cache(self) -> None:
        if self.direct:
            logger.info("%s goes through the page cache: O_DIRECT was refused", self._path)
        self.direct = False

    def _flags(self) -> int:
        return fcntl.fcntl(self._fd, fcntl.F_GETFL)

    def _named(self, what: str) -> AbstractContextManager[None]:
        return named(self._path, what)


def close(descriptor: int) -> None:
    """Linux takes a descriptor back also where this fails, and what had to be on the disk was
    waited for before."""
    with suppress(OSError):
        os.close(descriptor)


@contextmanager
def named(path: Path, what: str) -> Iterator[None]:
    """See ``failure``."""
    try:
        yield
    except OSError as error:
        raise failure(path, what, error) from error


def failure(path: Path, what: str, error: OSError, more: str = "") -> ImageError:
    """The error for what a disk, or a file system, has refused. ``more`` ends its text."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "look for errors of the disk in the kernel's log"
    if full:
        remedy = "free disk space, or save to another disk"
    elif error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS):
        remedy = "name a directory of a saved image, or for a new one, in a folder of this user"
    elif error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        remedy = "name another directory, or replace the image in it (--replace)"
    elif error.errno == errno.ENAMETOOLONG:
        remedy = "choose a shorter name"
    failed = ImageError(f"{path} could not be {what}: {error.strerror}; {remedy}{more}")
    with suppress(OSError):
        if full:
            failed.free_bytes = shutil.disk_usage(path.parent).free
    return failed
