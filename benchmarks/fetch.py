# SPDX-License-Identifier: Apache-2.0
"""Collects what measurements on a GPU need besides this repository, in build/bench-deps.

``acl/`` has the AscendCL headers of the installed torch_npu. ``peers/`` has torch_memory_saver, and
the few files of vLLM's sleep-mode allocator with small stubs for the modules that they import. Both
wheels come from the package index, and nothing of them is kept in the repository. The folder is
smaller than 10 MB and can be copied to a machine without a network.

    python benchmarks/fetch.py
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.build import DEPENDENCIES, PEERS

VLLM = "vllm==0.33.0"
MEMORY_SAVER = "torch-memory-saver==0.0.10"
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
VLLM_FILES = (
    "vllm/cumem_allocator.abi3.so",
    "vllm/device_allocator/__init__.py",
    "vllm/device_allocator/alloc_conf.py",
    "vllm/device_allocator/cumem.py",
    "vllm/distributed/device_communicators/cuda_wrapper.py",
)
# Stubs with only the names that those files use.
STAND_INS = {
    "__init__.py": "",
    "envs.py": "VLLM_CUDART_SO_PATH = None\n",
    "logger.py": """
import logging

def init_logger(name):
    logger = logging.getLogger(name)
    logger.info_once, logger.warning_once = logger.info, logger.warning
    return logger
""",
    "platforms.py": """
class Platform:
    device_type = "cuda"
    def is_cuda_alike(self): return True
    def is_rocm(self): return False
    def is_xpu(self): return False

current_platform = Platform()
""",
    "utils/__init__.py": "",
    "utils/torch_utils.py": "PIN_MEMORY = True\n",
    "utils/system_utils.py": """
def find_loaded_library(name):
    with open("/proc/self/maps") as maps:
        return next((line[line.index("/"):].strip() for line in maps if name in line), None)
""",
    "distributed/__init__.py": "",
    "distributed/device_communicators/__init__.py": "",
}


def download(requirement: str, folder: Path) -> zipfile.ZipFile:
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "-q"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    subprocess.run(command, check=True)
    name = requirement.partition("==")[0].replace("-", "_")
    return zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))


def main() -> None:
    torch_npu = importlib.util.find_spec("torch_npu")
    if torch_npu is None or torch_npu.origin is None:
        raise SystemExit("torch_npu is not installed here: no AscendCL headers to take")
    shutil.rmtree(DEPENDENCIES, ignore_errors=True)
    headers = Path(torch_npu.origin).parent / "include" / "acl"
    shutil.copytree(headers, DEPENDENCIES / "acl", symlinks=False)
    with tempfile.TemporaryDirectory() as folder:
        with download(VLLM, Path(folder)) as wheel:
            wheel.extractall(PEERS, VLLM_FILES)
        with download(MEMORY_SAVER, Path(folder)) as wheel:
            wheel.extractall(PEERS)
    for name, text in STAND_INS.items():
        path = PEERS / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(DEPENDENCIES)


if __name__ == "__main__":
    main()
