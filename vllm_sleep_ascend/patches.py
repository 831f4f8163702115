# SPDX-License-Identifier: Apache-2.0
"""Every callable of vLLM that this package replaces, and why: vLLM has no seam for it.

``python -m vllm_sleep_ascend.patches`` prints the table as docs/patches.md has it.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import requires, version
from typing import Any

from packaging.version import Version

from vllm_sleep_ascend.config import check_enabled
from vllm_sleep_ascend.engine import (
    core,
    kv_cache,
    launched,
    on_request,
    pauses,
    refusals,
    state,
    weight_version,
)
from vllm_sleep_ascend.engine.backups import place
from vllm_sleep_ascend.engine.checks import check_sleep, check_wake_up
from vllm_sleep_ascend.engine.rank_answers import reads_every_answer
from vllm_sleep_ascend.engine.wrap import Wrapper, wrap
from vllm_sleep_ascend.front_end import calls, endpoints, engine_death, replicas, server
from vllm_sleep_ascend.rank.guarded_calls import guards_calls


class PatchError(RuntimeError):
    """vLLM lacks what would be replaced. None of it was."""


@dataclass(frozen=True)
class Patch:
    """One callable of vLLM's.

    ``owner`` is a class (``module:Class``) or a module; ``wrapper`` makes ours of the stock one;
    ``parameters`` are those that ours goes by, in vLLM's order after ``self``; ``since`` is the
    first vLLM that has it, and older ones are passed over.
    """

    owner: str
    name: str
    wrapper: Wrapper
    parameters: tuple[str, ...]
    why: str
    since: str = ""

    @property
    def place(self) -> str:
        return f"{self.owner.replace(':', '.')}.{self.name}"

    def install(self) -> None:
        """Replace it, if this vLLM has it."""
        if self._stock() is not None:
            wrap(pkgutil.resolve_name(self.owner), self.name, self.wrapper)

    def _stock(self) -> Callable[..., Any] | None:
        try:
            stock: Callable[..., Any] = getattr(pkgutil.resolve_name(self.owner), self.name)
        except (ImportError, AttributeError):
            return None
        return stock

    def problem(self) -> str:
        """How vLLM differs from what is known; "" if it does not."""
        stock = self._stock()
        if stock is None:
            older = self.since and Version(version("vllm")).release < Version(self.since).release
            return "" if older else f"{self.place} is gone"
        taken = inspect.signature(stock).parameters
        actual = tuple(name for name in taken if name != "self")
        anything = any(p.kind is p.VAR_POSITIONAL for p in taken.values())
        if anything or actual[: len(self.parameters)] == self.parameters:
            return ""
        return f"{self.place} takes ({', '.join(actual)}), not ({', '.join(self.parameters)})"


def _instead(ours: Callable[..., Any]) -> Wrapper:
    """The wrapper of a replacement that does not call the stock one."""
    return lambda stock: ours


def _with_offline(stock: Callable[..., None]) -> Callable[..., None]:
    def init(self: object, /, *args: Any, **kwargs: Any) -> None:
        if "vllm.entrypoints.llm" in sys.modules:  # other processes never load it
            install(OFFLINE)
        stock(self, *args, **kwargs)

    return init


_CORE = "vllm.v1.engine.core:EngineCore"
_PROCESS = "vllm.v1.engine.core:EngineCoreProc"
_IN_PROCESS = "vllm.v1.engine.core_client:InprocClient"
_BLOCKING = "vllm.v1.engine.core_client:SyncMPClient"
_CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
_CLIENT_OF_SEVERAL = "vllm.v1.engine.core_client:DPLBAsyncMPClient"
_OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
_EXECUTOR = "vllm.v1.executor.abstract:Executor"
_RANKS = "vllm.v1.executor.multiproc_executor:MultiprocExecutor"
_ONE_RANK = "vllm.v1.executor.uniproc_executor:UniProcExecutor"
_LAUNCHED = "vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher"
_ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"

_CHECKED = "input is checked before an engine sees it, errors keep their type, gauges follow"
_PLACE = "a sleep may name the place of its backups"
_NOTED = "afterwards the engine may have to refuse requests: the next one asks it first"
_REFUSED = "stock vLLM lets requests wait in an engine that does not serve; an option refuses them"
_DEAD = "a call to an engine that dies meanwhile raises, and does not wait for ever"
_ADDED = f"{_REFUSED}, and another lets them wake it"
_SEVERAL = "an error names its data-parallel engine, and comes once every engine has answered"
_VERSION = "the version is that of the weights loaded last"

EVERYWHERE = (
    # The engine's process
    Patch(_CORE, "sleep", core.sleep, ("level", "mode"),
          "the level can change while asleep; ranks refuse before requests are aborted"),
    Patch(_CORE, "wake_up", core.wake_up, ("tags",),
          "tags that are awake are passed over; a sleep that still waits is called off"),
    Patch(_CORE, "release_kv_cache_memory", core.release_kv_cache_memory, (),
          "refused while memory sleeps, and after the steps under way", since="0.32"),
    Patch(_CORE, "pause_scheduler", lambda stock: pauses.pause_scheduler(pauses.draining(stock)),
          ("mode", "clear_cache"),
          "a user's pause outlives a sleep; mode \"wait\" also where nobody else steps the engine"),
    Patch(_PROCESS, "pause_scheduler", pauses.pause_scheduler, ("mode", "clear_cache"),
          "a user's pause outlives a sleep, and a sleep that waits can be called off"),
    Patch(_CORE, "resume_scheduler", core.resume_scheduler, (),
          "nothing is scheduled before memory is awake and the weights are loaded"),
    Patch(_PROCESS, "_notify_idle_state_callbacks", on_request.resting, (),
          "an engine that is idle may sleep by itself, and one that sleeps move its backup"),
    Patch(_PROCESS, "resume_scheduler", pauses.still_rejecting, (),
          "a pause that rejects requests does so until its user resumes"),
    Patch(_CORE, "is_sleeping", core.is_sleeping, (),
          "an engine that waits for its weights does not sleep"),
    Patch(_CORE, "reset_prefix_cache", kv_cache.with_copies,
          ("reset_running_requests", "reset_connector"),
          "copies of the cache in a KV connector go with it, and its events are published"),
    Patch(_CORE, "reset_mm_cache", on_request.keeping_inputs, (),
          "front ends send an image once: an engine that sleeps by itself keeps its copy"),
    Patch(_CORE, "collective_rpc", core.collective_rpc, ("method",),
          "calls that touch sleeping memory are refused, and those that move memory followed"),
    Patch(_CORE, "add_request", core.add_request, ("request",), _ADDED),
    Patch(_CORE, "step", core.step, (), "no step runs on memory that sleeps"),
    Patch(_CORE, "step_with_batch_queue", core.step, (), "no step runs on memory that sleeps"),
    Patch(_CORE, "set_weight_version", weight_version.set_weight_version, ("weight_version",),
          _VERSION, since="0.32"),
    Patch(_CORE, "get_weight_version", weight_version.get_weight_version, (),
          _VERSION, since="0.32"),
    # The engine's calls of its ranks
    Patch(_RANKS, "collective_rpc", lambda stock: reads_every_answer(guards_calls(stock)),
          ("method", "timeout"),
          "every rank's answer is read also after an error, and a rank that hangs is named"),
    Patch(_EXECUTOR, "sleep", place.sleeping_to, ("level",),
          "the place that a sleep names for its backups reaches the workers"),
    Patch(_ONE_RANK, "collective_rpc", guards_calls, ("method",),
          "calls that touch sleeping memory are refused; so too with Ray's executor, or a user's"),
    Patch(_LAUNCHED, "collective_rpc", launched.together, ("method",),
          "the engines of torchrun's ranks agree whether to sleep"),
    # Front ends
    Patch(_IN_PROCESS, "sleep", _instead(pauses.sleep_in_process), ("level", "mode"),
          "the engine drains itself, and there is nothing to wait for"),
    Patch(_IN_PROCESS, "get_output", pauses.get_output, (),
          "outputs of requests that ended while the engine drained are delivered"),
    Patch(_BLOCKING, "call_utility", engine_death.raises_in_thread, ("method",), _DEAD),
    Patch(_CLIENT, "_call_utility_async", engine_death.raises, ("method",), _DEAD),
    Patch(_CLIENT, "call_utility_all_async", _instead(replicas.call_all), ("method",),
          _SEVERAL, since="0.32"),
    Patch(_CLIENT_OF_SEVERAL, "call_utility_async", replicas.of_the_first, ("method",), _SEVERAL),
    Patch(_CLIENT, "is_sleeping_async", replicas.is_sleeping, (),
          "where engines differ after a failure, some sleep"),
    Patch(_OUTPUTS, "process_outputs", refusals.process_outputs, ("engine_core_outputs",),
          "a request that the engine refused raises the reason"),
    Patch(_ENGINE, "__init__", _with_offline, ("vllm_config",),
          "LLM's methods are replaced where its module is loaded"),
    Patch(_ENGINE, "sleep",
          lambda stock: calls.checked(check_sleep)(calls.with_place(stock)), ("level", "mode"),
          f"{_CHECKED}; {_PLACE}"),
    Patch(_ENGINE, "wake_up", calls.checked(check_wake_up), ("tags",), _CHECKED),
    Patch(_ENGINE, "release_kv_cache_memory", calls.checked(check_enabled), (), _CHECKED,
          since="0.32"),
    Patch(_ENGINE, "add_request", calls.admitted_in_process, ("request_id",), _REFUSED),
    Patch(_ASYNC, "sleep",
          lambda stock: calls.checked_async(check_sleep)(calls.with_place(stock)),
          ("level", "mode"), f"{_CHECKED}; {_PLACE}"),
    Patch(_ASYNC, "wake_up", calls.checked_async(check_wake_up), ("tags",), _CHECKED),
    Patch(_ASYNC, "release_kv_cache_memory", calls.checked_async(check_enabled), (), _CHECKED,
          since="0.32"),
    Patch(_ASYNC, "add_request", calls.admitted, ("request_id",), _ADDED),
    Patch(_ASYNC, "resume_generation", calls.resume_generation, (),
          "a sleep that still waits on one engine is called off on all"),
    Patch(_ASYNC, "collective_rpc", calls.noted, ("method",), _NOTED),
    Patch(_ASYNC, "pause_generation", calls.noted, ("mode",), _NOTED),
    # The HTTP server
    Patch("vllm.entrypoints.serve.instrumentator", "register_instrumentator_api_routers",
          server.with_middleware, ("app",),
          "options refuse requests with 503 or let them wake the engine, gauges are fresh when "
          "they are read, and the admin door lives as long as the server"),
)  # fmt: skip

DEVELOPMENT = (
    Patch("vllm.entrypoints.serve.dev.sleep.api_router", "attach_router",
          _instead(endpoints.attach_router), ("app",),
          "the endpoints take a JSON body, answer refusals with a reason, and tell the status"),
)  # fmt: skip
"""With ``VLLM_SERVER_DEV_MODE=1`` alone."""

_STEPPING = ("generate", "chat", "encode", "embed", "classify", "score", "beam_search")
OFFLINE = (
    *(
        Patch("vllm.entrypoints.llm:LLM", name, calls.serving, (),
              "an engine that sleeps would be stepped for ever")
        for name in (*_STEPPING, "wait_for_completion")
    ),
    Patch("vllm.entrypoints.llm:LLM", "sleep", calls.sleep_of_llm, ("level", "mode"), _PLACE),
)  # fmt: skip
"""When an ``LLM`` makes its engine."""

ADDED = {
    "sleep_mode_refusal": (core.refusal, "front ends ask why requests are refused"),
    "sleep_mode_pending": (state.is_pending, "front ends ask whether a sleep waits"),
}
"""Methods that EngineCore has from us, and why."""


def problems(patches: Iterable[Patch] = EVERYWHERE) -> list[str]:
    """How vLLM differs from what this package knows."""
    return [problem for patch in patches if (problem := patch.problem())]


def install_all() -> None:
    """What a process of vLLM's needs. Repeating it changes nothing.

    Raises:
        PatchError: vLLM lacks something, or it takes other parameters; names all of it.
    """
    from vllm import envs
    from vllm.v1.engine.core import EngineCore

    install(EVERYWHERE + (DEVELOPMENT if envs.VLLM_SERVER_DEV_MODE else ()))
    for name, (function, _) in ADDED.items():
        setattr(EngineCore, name, function)


def install(patches: Iterable[Patch]) -> None:
    """As ``install_all``, of these."""
    patches = tuple(patches)
    if wrong := problems(patches):
        supported = next(r for r in requires("vllm_sleep_ascend") or () if r.startswith("vllm"))
        raise PatchError(
            f"vllm_sleep_ascend {version('vllm_sleep_ascend')} does not know this vLLM "
            f"({version('vllm')}): {'; '.join(wrong)}. None of it was replaced. Install a vLLM "
            f"that it supports ({supported}), or a newer vllm_sleep_ascend"
        )
    for patch in patches:
        patch.install()


def table() -> str:
    """All of it in Markdown."""
    rows = ["| of vLLM | parameters | since | why |", "|---|---|---|---|"]
    for patch in EVERYWHERE + DEVELOPMENT + OFFLINE:
        name = ".".join(patch.place.split(".")[-2:])
        taken = ", ".join(patch.parameters)
        rows.append(f"| `{name}` | {taken} | {patch.since} | {patch.why} |")
    rows += (f"| `EngineCore.{name}` |  | added | {why} |" for name, (_, why) in ADDED.items())
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
