# SPDX-License-Identifier: Apache-2.0
"""The C++ contract tests of the allocator core, under AddressSanitizer, UBSan and LeakSanitizer.

`make sanitize` runs them under ThreadSanitizer as well, which takes minutes.
"""

import shutil
import subprocess
import sys

import pytest
from support import ROOT


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizer runtimes")
def test_the_core_is_clean_under_the_address_sanitizer():
    command = ["make", "-C", ROOT / "tests" / "cpp", "-j2", "run", "SANITIZE=address"]
    done = subprocess.run(
        [*command, f"PYTHON={sys.executable}"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "0 failed" in done.stdout
    assert "runtime error" not in done.stderr
