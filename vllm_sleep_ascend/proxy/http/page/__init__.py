# SPDX-License-Identifier: Apache-2.0
"""The operator's page, as a browser gets it: files without a build step, with all their texts in
``texts.json``."""

from pathlib import Path

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


def files() -> dict[str, tuple[bytes, str]]:
    """Content and media type by path; ``/`` is the page."""
    found = {
        f"/{path.name}": (path.read_bytes(), _TYPES[path.suffix])
        for path in Path(__file__).parent.iterdir()
        if path.suffix in _TYPES
    }
    found["/"] = found.pop("/index.html")
    return found
