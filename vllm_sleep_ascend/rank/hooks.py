# SPDX-License-Identifier: Apache-2.0
"""Hooks of a platform for sleep, wake and loads of weights."""

from vllm_sleep_ascend.rank.host_worker import HostWorker


class Hooks:
    """The hooks of vLLM's own worker, which do nothing."""

    def __init__(self, worker: HostWorker) -> None:
        self._worker = worker

    def sleep_refusal(self, level: int) -> str | None:
        """Why this rank cannot sleep at this level; None if it can."""
        return None

    def before_sleep(self) -> None:
        """Runs, or refuses the sleep, before memory is touched. Part of the transaction."""

    def after_sleep(self) -> None:
        """Frees other memory after every rank sleeps."""

    def after_wake(self) -> None:
        """Restores other state after every rank has its memory. If it fails, the engine counts as
        asleep, and the wake can be retried."""

    def preserved_parameters(self) -> list[str]:
        """Patterns of the parameters that level 2 keeps."""
        return self._worker.model_config.sleep_preserve_parameter_names

    def check_reload(self) -> None:
        """
        Raises:
            SleepModeError: the weights cannot be loaded again in place.
        """

    def check_draft_reload(self) -> None:
        """
        Raises:
            SleepModeError: a draft model cannot be loaded again.
        """

    def image_refusal(self) -> str | None:
        """With what no image can be saved, and the remedy; None if one can."""
        return None

    def can_copy_back(self) -> bool:
        """Whether copying the weights to the host and back leaves them unchanged."""
        return True
