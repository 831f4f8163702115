# SPDX-License-Identifier: Apache-2.0
"""What a rank knows of the content of its weights: which parameters have none since level 2."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.rank.weights.shards import shards_of
from vllm_sleep_ascend.rank.weights.unwritten import mark, unwritten, unwritten_at_start

DRAFT = "draft."
"""What stands before the names of a draft model's parameters."""

_NAMED = 8  # parameters of which the shards are told


@dataclass(frozen=True)
class Knowledge:
    """What is known at one time."""

    lost: frozenset[str] = field(default_factory=frozenset)
    corrupt: bool = False


class WeightsContent:
    """The parameters whose content was lost, and which of them have been written since.

    ``mark`` marks them once their memory is awake. Afterwards their memory itself tells: a
    parameter without a mark was written, by whomever, and is not looked at again.
    """

    def __init__(self, worker: HostWorker) -> None:
        self._worker = worker
        self._lost: set[str] = set()
        self._found_corrupt = False
        self.beyond_loading = False

    def parameters(self) -> dict[str, torch.Tensor]:
        """All parameters as they are now, one that several models share once."""
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for prefix, model in models_of(self._worker).items():
            for name, parameter in model.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[prefix + name] = parameter
        return found

    def lose(self, names: Iterable[str]) -> None:
        """Note that these parameters have no content any more."""
        self._lost |= set(names)

    def mark(self) -> None:
        """Overwrite what was lost with marks; its memory is awake."""
        parameters = self.parameters()
        for name in self._lost & parameters.keys():
            mark(parameters[name])

    def spoil(self, prefix: str = "") -> None:
        """Lose all parameters of one model, whose content is there and cannot be relied on."""
        self.lose(name for name in self.parameters() if of_model(name, prefix))
        self.mark()

    def found_corrupt(self, names: Iterable[str], beyond_loading: bool) -> None:
        """Note that these parameters are not what they should be, and whether loading them mends
        all that is wrong. Their memory is awake."""
        self.lose(names)
        self.mark()
        self._found_corrupt = True
        self.beyond_loading = self.beyond_loading or beyond_loading

    def written(self) -> None:
        """Take somebody's word that every parameter has been written."""
        self._lost.clear()

    def missing(self) -> list[str]:
        """The names of the parameters that were lost and not wholly written since. Where memory
        sleeps nothing can be written, nor looked at."""
        if self._lost and self._awake():
            self._look()
        return sorted(self._lost)

    def missing_of(self, prefix: str) -> list[str]:
        """The same, of one model alone."""
        return [name for name in self.missing() if of_model(name, prefix)]

    def missing_shards(self) -> list[str]:
        """The same, of all; of the first, the shards that are missing where others are there."""
        names = self.missing()
        if not names or not self._awake():
            return names
        parameters = self.parameters()
        if _are_aside(parameters):
            return names
        told: list[str] = []
        for name in names[:_NAMED]:
            shards = self._shards(name, parameters[name])
            flags = unwritten(shards.values())
            told += [name] if all(flags) else _those(shards, flags)
        return told + names[_NAMED:]

    @property
    def corrupt(self) -> bool:
        """Whether content that was found to be wrong has not all been written since."""
        return self.beyond_loading or (self._found_corrupt and bool(self._lost))

    def knowledge(self) -> Knowledge:
        """What is known now, for ``know``."""
        return Knowledge(frozenset(self._lost), self._found_corrupt)

    def know(self, knowledge: Knowledge) -> None:
        """What was known then holds again: the memory is as it was then."""
        self._lost, self._found_corrupt = set(knowledge.lost), knowledge.corrupt

    def _look(self) -> None:
        """Forget those that have been written. Only what is written at its start is read whole, so
        that looking after each of many small loads reads every parameter about once."""
        parameters = self.parameters()
        if _are_aside(parameters):
            return
        lost = [name for name in self._lost if name in parameters]
        begun = _those(lost, map(_not, unwritten_at_start(parameters[name] for name in lost)))
        whole = _those(begun, map(_not, unwritten(parameters[name] for name in begun)))
        self._lost = set(lost) - set(whole)

    def _shards(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        models = models_of(self._worker)
        prefix = DRAFT if name.startswith(DRAFT) and DRAFT in models else ""
        shards = shards_of(models[prefix], name.removeprefix(prefix), parameter)
        return {prefix + shard: content for shard, content in shards.items()}

    def _awake(self) -> bool:
        enabled = self._worker.model_config.enable_sleep_mode
        return not enabled or not self._worker.sleep_mode_backend.asleep("weights")


def models_of(worker: HostWorker) -> dict[str, nn.Module]:
    """A rank's model, and its draft model, by what stands before the names of their parameters."""
    models = {"": worker.model_runner.get_model()}
    draft = worker.get_draft_model()
    return models if draft is None else {**models, DRAFT: draft}


def _are_aside(parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether an update is under way, during which a model has others, without memory."""
    return any(parameter.is_meta for parameter in parameters.values())


def of_model(name: str, prefix: str) -> bool:
    """Whether a parameter is the draft model's, for ``DRAFT``, or the model's own, for ""."""
    return name.startswith(DRAFT) == (prefix == DRAFT)


def _those(names: Iterable[str], flags: Iterable[bool]) -> list[str]:
    return [name for name, flag in zip(names, flags, strict=True) if flag]


def _not(flag: bool) -> bool:
    return not flag
