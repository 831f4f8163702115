# SPDX-License-Identifier: Apache-2.0
"""Checks vllm-ascend and vLLM before anything is changed.

The table lists what this package replaces in vllm-ascend, and what it calls in vllm-ascend and
vLLM; ``patches`` lists what it replaces in vLLM. The check reads the source without importing it,
because a front end must not import vllm-ascend's worker.
"""

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

from vllm.logger import init_logger

from vllm_sleep_ascend.beside import SWITCH, TESTED

logger = init_logger(f"vllm.{__name__}")

# module -> class -> method -> its parameters after self. Further parameters are allowed.
SEAMS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "vllm_ascend.device_allocator.camem": {
        "CaMemAllocator": {
            "get_instance": (),
            "use_memory_pool": ("tag",),
            "use_allocation_tag": ("tag",),
            "sleep": ("offload_tags",),
            "wake_up": ("tags",),
            "get_current_usage": (),
            "python_malloc_callback": ("allocation_handle",),
            "python_free_callback": ("ptr",),
        }
    },
    "vllm_ascend.device_allocator.sleep_mem_optimized": {
        "SleepWakeupManager": {"sleep": (), "wakeup": ("tags",)},
        "HcclSleepWakeupManager": {"refresh_moe_hccl_groups": ()},
        "AclGraphSleepWakeupManager": {"sleep": (), "wakeup": ("tags",)},
    },
    "vllm_ascend.worker.worker": {
        "NPUWorker": {
            "sleep": ("level",),
            "wake_up": ("tags",),
            "init_device": (),
            "_init_device": (),
            "load_model": (),
            "determine_available_memory": (),
            "initialize_from_config": ("kv_cache_config",),
            "compile_or_warm_up_model": (),
            "execute_model": ("scheduler_output",),
            "execute_dummy_batch": (),
            "start_weight_update": (),
            "update_weights": ("update_info",),
            "finish_weight_update": (),
            "shutdown": (),
        }
    },
    "vllm_ascend.worker.model_runner_v1": {"NPUModelRunner": {"profile_run": ()}},
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner": {
            "reload_weights": ("weights_iterator", "weights_path", "is_checkpoint_format"),
            "get_model": (),
        }
    },
    "vllm.v1.executor.abstract": {
        "Executor": {"sleep": ("level",), "wake_up": ("tags",), "collective_rpc": ("method",)}
    },
    "vllm.v1.engine.core": {"EngineCore": {"is_scheduler_paused": ()}},
    "vllm.v1.engine.llm_engine": {"LLMEngine": {"is_sleeping": ()}},
    "vllm.v1.engine.async_llm": {"AsyncLLM": {"is_sleeping": ()}},
}


class SeamError(RuntimeError):
    """vllm-ascend or vLLM lacks something that this package replaces or calls."""


def check_seams() -> None:
    """Compare the installed sources with the table, and warn about untested versions.

    Raises:
        SeamError: something is missing or has other parameters; lists all of it.
    """
    from vllm_sleep_ascend import patches

    installed = {package: version(package) for package in TESTED}
    wrong = [problem for module, classes in SEAMS.items() for problem in _compare(module, classes)]
    wrong += patches.problems()
    found = ", ".join(f"{package} {number}" for package, number in installed.items())
    tested = ", ".join(f"{package} {' or '.join(numbers)}" for package, numbers in TESTED.items())
    if wrong:
        raise SeamError(
            f"vllm_sleep_ascend cannot take over sleep mode from this vllm-ascend ({found}; tested "
            f"with {tested}): {'; '.join(wrong)}. Nothing was changed. Install the tested versions "
            f"or a newer vllm_sleep_ascend, or set {SWITCH}=0 to leave sleep mode to vllm-ascend"
        )
    if any(installed[package] not in numbers for package, numbers in TESTED.items()):
        logger.warning(
            "vllm_sleep_ascend was tested with %s, and this is %s. The methods that it replaces or "
            "calls exist with the expected parameters; their behaviour was not checked. "
            "%s=0 leaves sleep mode to vllm-ascend.",
            tested,
            found,
            SWITCH,
        )


def _compare(module: str, expected: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        return [f"module {module} is gone"]
    tree = ast.parse(Path(spec.origin).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    problems = []
    for name, methods in expected.items():
        if name not in classes:
            problems.append(f"{module} has no class {name}")
            continue
        problems += [
            f"{module}.{name}.{problem}" for problem in _compare_methods(classes[name], methods)
        ]
    return problems


def _compare_methods(node: ast.ClassDef, expected: dict[str, tuple[str, ...]]) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {item.name: item for item in node.body if isinstance(item, kinds)}
    problems = []
    for name, parameters in expected.items():
        if name not in found:
            problems.append(f"{name} is gone")
            continue
        arguments = found[name].args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        actual = tuple(parameter for parameter in names if parameter != "self")
        if actual[: len(parameters)] != parameters:
            problems.append(f"{name} takes ({', '.join(actual)}), not ({', '.join(parameters)})")
    return problems
