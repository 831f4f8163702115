# SPDX-License-Identifier: Apache-2.0
"""Builds the allocator over CUDA, and loads it.

Needs g++, make, CUDA and pybind11. The AscendCL headers are from torch_npu if it is installed,
otherwise from the folder that ``fetch.py`` has created.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = ROOT / "build" / "bench-deps"  # created by fetch.py
PEERS = DEPENDENCIES / "peers"
OUT = ROOT / "build" / "bench-cuda"
PARTS = ("ascendcl", "disk", "host", "pool")  # of the allocator, in csrc


def build() -> None:
    """Compile libascendcl.so over CUDA and the allocator against it, once."""
    import pybind11

    module = _module()
    csrc = ROOT / "csrc"
    sources = [csrc / "bindings.cpp", csrc / "torch_hooks.cpp"]
    sources += sorted(path for part in PARTS for path in (csrc / part).glob("*.cpp"))
    acl = _acl_include()
    make = ["make", "-s", "-j8", "-C", str(csrc / "sim"), "-f", "cuda.mk"]
    subprocess.run([*make, f"PREFIX={OUT}", f"ACL_INCLUDE={acl}"], check=True)
    newest = max(path.stat().st_mtime for path in csrc.rglob("*.*"))
    if module.exists() and module.stat().st_mtime > newest:
        return
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(acl)]
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{csrc}"]
    flags += [f"-isystem{include}" for include in includes]
    objects = [str(OUT / f"{source.parent.name}_{source.stem}.o") for source in sources]
    jobs = [
        subprocess.Popen(["g++", *flags, "-c", str(source), "-o", object_])
        for source, object_ in zip(sources, objects, strict=True)
    ]
    if any(job.wait() != 0 for job in jobs):
        raise SystemExit("the allocator cannot be compiled")
    lib = OUT / "lib64"
    link = ["g++", "-shared", "-o", str(module), *objects, f"-L{lib}", "-lascendcl"]
    subprocess.run([*link, f"-Wl,-rpath,{lib}"], check=True)


def load(device: str) -> Any:
    """The compiled allocator for "cuda", "npu" or "sim"."""
    sys.path.append(str(ROOT))
    if device != "cuda":
        from vllm_sleep_ascend import _camem

        return _camem
    spec = importlib.util.spec_from_file_location("_camem", _module())
    if spec is None or spec.loader is None:
        raise SystemExit(f"{_module()} is missing")
    camem = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(camem)
    return camem


def device_gib() -> int:
    """GiB of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout) // 1024


def _module() -> Path:
    return OUT / f"_camem{sysconfig.get_config_var('EXT_SUFFIX')}"


def _acl_include() -> Path:
    torch_npu = importlib.util.find_spec("torch_npu")
    if torch_npu is not None and torch_npu.origin is not None:
        return Path(torch_npu.origin).parent / "include"
    if not (DEPENDENCIES / "acl").exists():
        raise SystemExit("no AscendCL headers: run benchmarks/fetch.py where torch_npu is, first")
    return DEPENDENCIES
