# SPDX-License-Identifier: Apache-2.0
"""Whether an engine whose memory is awake may serve: after level 2 its weights have no content."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine import weight_version
from vllm_sleep_ascend.engine.state import EngineState, is_pending
from vllm_sleep_ascend.status import WeightsReport

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

logger = init_logger(f"vllm.{__name__}")

_REMEDY = (
    "load them with collective_rpc('reload_weights') or a weight update, or tell the engine of a "
    "load that it cannot see with collective_rpc('mark_weights_loaded')"
)


class ServingGate:
    """Whether an EngineCore may serve, by its weights' content and the option ``after_level2``."""

    asleep = "the engine sleeps; wake it with wake_up() or POST /wake_up"

    def __init__(self, core: "EngineCore") -> None:
        self._core = core
        config = SleepModeConfig.from_vllm_config(core.vllm_config)
        self._holds = config.after_level2 != "warn"
        self.refuses_while_asleep = config.while_asleep == "refuse"
        self._missing: list[str] = []
        self._updating = self._corrupt = self._beyond_loading = False
        self._before = PauseState.UNPAUSED  # the pause state once the engine may serve
        self.users_pause = PauseState.UNPAUSED  # outlives sleep and wake, until the user resumes
        self._warned = False
        self.held = False
        self.unseen = False  # a call timed out that may load weights

    @classmethod
    def of(cls, core: "EngineCore") -> "ServingGate | None":
        """The gate of this engine; None without sleep mode."""
        if not core.vllm_config.model_config.enable_sleep_mode:
            return None
        state = EngineState.of(core)
        if state.gate is None:
            state.gate = cls(core)
        return state.gate

    def look(self) -> None:
        """Query the workers."""
        executor = self._core.model_executor
        contents: list[WeightsReport] = executor.collective_rpc("weights_content")
        self._missing = sorted({name for content in contents for name in content["missing"]})
        self._updating = any(content["updating"] for content in contents)
        self._corrupt = any(content["corrupt"] for content in contents)
        self._beyond_loading = any(content["beyond_loading"] for content in contents)
        self._warned = self._warned and bool(self._missing)
        weight_version.follow(self._core, contents)
        self.unseen = False

    @property
    def closed(self) -> bool:
        """Whether nothing may be scheduled, by the last query."""
        return self._updating or self._corrupt or (self._holds and bool(self._missing))

    @property
    def clear(self) -> bool:
        """Whether the weights were complete at the last query."""
        return not self._updating and not self._missing

    @property
    def was_paused(self) -> bool:
        """Whether the engine was paused before it was held, and will be again once it may serve."""
        return self._before != PauseState.UNPAUSED

    def hold(self, before: PauseState = PauseState.UNPAUSED) -> None:
        """Schedule nothing until the weights are loaded; then restore ``before``."""
        self.held, self._before = True, before
        self._core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        log = logger.info if self._updating else logger.warning
        log("The engine does not serve yet: %s", self._reason())

    def paused_by_user(self, state: PauseState) -> None:
        """The user has paused the engine, as opposed to a sleep."""
        self.users_pause = state
        if self.held:
            self._before = state
            self._core.scheduler.set_pause_state(PauseState.PAUSED_ALL)

    def follow_load(self) -> None:
        """After a call that may have loaded weights: serve again, or hold."""
        self.look()
        asleep = self._core.model_executor.is_sleeping
        if self.held and not self.closed and not asleep:
            if is_pending(self._core):
                self.held = False
                self._core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            elif self.was_paused:
                self.held = False
                self._core.scheduler.set_pause_state(self._before)
            else:
                serve_on(self._core)
        elif self.closed and not self.held and not asleep:
            self.hold(self._core.scheduler.pause_state)

    def warn(self) -> None:
        """Warn, once for each level-2 sleep, that weights without content are served."""
        if self._missing and not self._warned:
            self._warned = True
            logger.warning("The engine serves, but %s", self._reason())

    def refusal(self) -> str | None:
        """Why new requests are refused now; None if they are accepted."""
        if self.held and not self._core.model_executor.is_sleeping:
            return f"the engine does not serve yet: {self._reason()}"
        if not self.refuses_while_asleep or not self._core.is_sleeping():
            return None
        if self.users_pause != PauseState.UNPAUSED and not self._core.model_executor.is_sleeping:
            return "the engine is paused; resume it with resume_generation() or POST /resume"
        return self.asleep

    def look_and_refuse(self) -> str | None:
        """Like ``refusal``, after a query of the workers: code in their processes may have written
        weights."""
        if self.held and not self._core.model_executor.is_sleeping:
            self.follow_load()
        return self.refusal()

    @property
    def refuses(self) -> bool:
        """Whether an option may refuse requests."""
        return self._holds or self.refuses_while_asleep

    def _reason(self) -> str:
        if self._updating:
            return "a weight update is under way; call finish_weight_update"
        if self._beyond_loading:
            return "verify_wake found other memory than went to sleep; restart the engine"
        if self._corrupt:
            return f"verify_wake found other weights than went to sleep; {_REMEDY}"
        names = ", ".join(self._missing[:3]) + (", ..." if len(self._missing) > 3 else "")
        return (
            f"the weights were discarded by sleep level 2, or a load of them broke off, and "
            f"{len(self._missing)} parameters have not been loaded since ({names}); {_REMEDY}"
        )


def serve_on(core: "EngineCore") -> None:
    """Resume what a sleep has paused. The user's own pause stays in force."""
    state = EngineState.of(core)
    before, state.wakes = state.wakes, True
    try:
        core.resume_scheduler()
    finally:
        state.wakes = before
