# SPDX-License-Identifier: Apache-2.0
"""The key of a server's admin door and of the proxy's admin port: where it is read, and how it is
compared. Imports no vLLM.

A configuration is printed in logs and in lists of processes, so the key is never a value in one.
"""

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable

# Not VLLM_...: vLLM copies those to Ray's workers, and lists them in reports.
VARIABLE = "SLEEP_ADMIN_KEY"

MIN_LENGTH = 16
_MAX_BYTES = 4096
_HOST = re.compile(rb"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]]+)(:\d+)?", re.IGNORECASE)
_MAKE_ONE = "make one with: openssl rand -hex 32"


def read(file: str | None = None) -> str | None:
    """The key in ``file``, or else in the environment; None if there is none.

    Raises:
        ValueError: the file cannot be used, or what is there is no key. Names the place alone.
    """
    if file is not None:
        return _checked(_content(file), file)
    key = os.environ.get(VARIABLE)
    return None if key is None else _checked(key, f"the environment's {VARIABLE}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(header: bytes) -> str:
    """The name or address in a Host header, without a port; "" if there is none."""
    found = _HOST.fullmatch(header)
    return "" if found is None else found["name"].decode("latin-1").lower().strip("[]")


def bearer(header: bytes) -> bytes:
    """The key in an Authorization header; empty if there is none."""
    scheme, _, key = header.partition(b" ")
    return key if scheme.lower() == b"bearer" else b""


def digest(key: str) -> bytes:
    """What is kept of a key, to compare with."""
    return hashlib.sha256(key.encode()).digest()


def is_key(given: bytes, expected: bytes) -> bool:
    """Whether ``given`` is the key with this digest, in a time that tells nothing of the key."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), expected)


def refusal(authorization: bytes, expected: bytes) -> str | None:
    """Why a header does not give the key with this digest; None if it does."""
    given = bearer(authorization)
    if not given:
        return "the admin key is needed: send it as Authorization: Bearer KEY"
    return None if is_key(given, expected) else "the admin key is wrong"


def repeated(headers: Iterable[tuple[bytes, bytes]], once: Iterable[bytes]) -> str | None:
    """What is wrong with headers of which one of ``once`` is there again; None if none is."""
    counts = Counter(name for name, _ in headers)
    twice = next((name for name in once if counts[name] > 1), None)
    return None if twice is None else f"{twice.decode()} is there more than once"


def _checked(key: str, place: str) -> str:
    if len(key) < MIN_LENGTH:
        raise ValueError(
            f"{place} has {len(key)} characters, and a key at least {MIN_LENGTH}; {_MAKE_ONE}"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"{place} has more than printable ASCII without spaces; {_MAKE_ONE}")
    return key


def _content(file: str) -> str:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not of a pipe
    except OSError as error:
        raise ValueError(f"the key's file {file} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"the key's file {file} is no regular file")
        if found.st_uid not in (os.geteuid(), 0):
            raise ValueError(
                f"the key's file {file} belongs to user {found.st_uid}; chown it to "
                f"{os.geteuid()}, who runs this"
            )
        if found.st_mode & 0o077:
            raise ValueError(
                f"others can read the key's file {file} (mode {found.st_mode & 0o777:o}): "
                "chmod 600 it, and change the key"
            )
        return os.read(descriptor, _MAX_BYTES).decode(errors="replace").strip("\r\n")
    finally:
        os.close(descriptor)
