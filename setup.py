# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled allocator against CANN; everything else is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

REMEDY = (
    "Either source CANN's set_env.sh, or build the simulated toolkit (`make toolkit`) and source "
    "the set_env.sh that it makes. COMPILE_CUSTOM_KERNELS=0 installs without sleep mode. "
    "COMPILE.md has the details."
)


def toolkit() -> Path:
    """The CANN toolkit that ASCEND_HOME_PATH names."""
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home:
        raise SystemExit(f"error: ASCEND_HOME_PATH is not set: no CANN to build against. {REMEDY}")
    for needed in ("include/acl/acl.h", "lib64/libascendcl.so"):
        if not (Path(home) / needed).exists():
            raise SystemExit(f"error: ASCEND_HOME_PATH={home} has no {needed}. {REMEDY}")
    return Path(home)


def sources(kind: str) -> list[str]:
    """The files of the allocator; csrc/sim is the simulator's."""
    files = Path("csrc").rglob(f"*.{kind}")
    return sorted(str(file) for file in files if file.parts[1] != "sim")


class BuildAllocator(build_ext):
    """Looks for CANN only when it compiles: a source distribution is made without."""

    def build_extensions(self) -> None:
        home = toolkit()
        for extension in self.extensions:
            extension.include_dirs.append(str(home / "include"))
            extension.library_dirs.append(str(home / "lib64"))
        super().build_extensions()


def extensions() -> list:
    choice = os.environ.get("COMPILE_CUSTOM_KERNELS", "1")
    if choice == "0":
        return []
    if choice != "1":
        raise SystemExit(f"error: COMPILE_CUSTOM_KERNELS={choice} is neither 0 nor 1")
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension

    ParallelCompile("CMAKE_BUILD_PARALLEL_LEVEL", default=2).install()
    return [
        Pybind11Extension(
            "vllm_sleep_ascend._camem",
            sources("cpp"),
            include_dirs=["csrc"],
            libraries=["ascendcl"],
            depends=sources("h"),
            cxx_std=17,
            extra_compile_args=["-O2", "-g1", "-Wall", "-Wextra"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildAllocator})
