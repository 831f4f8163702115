# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run to their end."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.patience import patience
from helpers.warm import kill_group


def run(
    command: Sequence[str | Path], seconds: float, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run the command, capture its output, and kill everything that it leaves running.

    ``options`` are those of ``subprocess.Popen``.

    Raises:
        subprocess.TimeoutExpired: it has not ended within ``seconds`` times the patience.
    """
    with subprocess.Popen(
        list(map(os.fspath, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds * patience())
        finally:
            kill_group(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
