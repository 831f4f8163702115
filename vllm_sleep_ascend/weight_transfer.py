# SPDX-License-Identifier: Apache-2.0
"""``safetensors``: a weight-transfer backend of vLLM for trainer and workers that share a folder.

The trainer writes a part of the weights to a file, in ``/dev/shm`` for one machine or on a shared
file system for several, has the workers load it, and removes it. vLLM's own backends move weights
through CUDA's communication and cannot run on NPUs.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from vllm_sleep_ascend.releases import full_weights, held_elsewhere

BACKEND = "safetensors"

_PART_BYTES = 1 << 30


def register() -> None:
    """Make the backend known to vLLM. Repeating it changes nothing."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "SafetensorsEngine")
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, __name__, "SafetensorsTrainer")


@dataclass
class SafetensorsInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class SafetensorsUpdateInfo(WeightTransferUpdateInfo):
    """One part: a file with weights under the names of the checkpoint."""

    path: str


class SafetensorsEngine(WeightTransferEngine[SafetensorsInitInfo, SafetensorsUpdateInfo]):
    """The workers' side."""

    init_info_cls = SafetensorsInitInfo
    update_info_cls = SafetensorsUpdateInfo

    def init_transfer_engine(self, init_info: SafetensorsInitInfo) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SafetensorsUpdateInfo) -> None:
        """
        Raises:
            ValueError: there is no such file, or it is not in safetensors format.
        """
        path = update_info.path
        if not os.path.isfile(path):
            raise ValueError(f"update_weights: {path!r} is not a file that this worker can see")
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except Exception as error:
            raise ValueError(f"update_weights: {path!r} is not in safetensors format") from error
        with file:
            model: Any = self.model
            model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""


@dataclass
class SafetensorsTrainerInitInfo(TrainerInitInfo):
    """``folder``: where trainer and workers meet. ``part_bytes``: how much one file may hold."""

    backend: ClassVar[str] = BACKEND

    folder: str = "/dev/shm"
    part_bytes: int = _PART_BYTES


class SafetensorsTrainer(TrainerWeightTransferEngine[SafetensorsTrainerInitInfo]):
    """The trainer's side: rank 0 writes, every rank iterates the source."""

    init_info_cls = SafetensorsTrainerInitInfo

    def __init__(
        self, info: SafetensorsTrainerInitInfo, client: VLLMWeightSyncClient, source: WeightSource
    ) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self._info = info

    @classmethod
    def trainer_init(
        cls,
        init_info: SafetensorsTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """
        Raises:
            ValueError: there is no source, or no such folder, or rank 0 would not send all of it.
        """
        if source is None:
            raise ValueError("the safetensors backend needs a WeightSource")
        if not os.path.isdir(init_info.folder):
            raise ValueError(f"folder {init_info.folder!r} does not exist")
        trainer = cls(init_info, client, source)
        if trainer.is_sender:
            if missing := held_elsewhere(source, init_info.rank):
                raise ValueError(
                    f"the safetensors backend sends what rank {init_info.rank} holds, and "
                    f"{len(missing)} parameters are held by other ranks alone "
                    f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); gather "
                    "them on every rank, as ModuleSource does with FSDP's shards"
                )
            client.init_weight_transfer_engine({})
        return trainer

    def send_weights(self) -> None:
        """Send all weights of the source, a part at a time."""
        if self.is_sender:
            self.client.start_weight_update()
        for part in self._parts():
            if self.is_sender:
                self._send(part)
        if self.is_sender:
            self.client.finish_weight_update()

    def _send(self, part: dict[str, torch.Tensor]) -> None:
        with tempfile.TemporaryDirectory(dir=self._info.folder, prefix="weights-") as folder:
            path = Path(folder) / "part.safetensors"
            save_file(part, path)
            self.client.update_weights({"path": str(path)})

    def _parts(self) -> Iterator[dict[str, torch.Tensor]]:
        assert self.source is not None
        part: dict[str, torch.Tensor] = {}
        for name, tensor in full_weights(self.source):
            # A clone: tied parameters share memory, which a file cannot.
            part[name] = tensor.detach().cpu().contiguous().clone()
            if sum(t.nbytes for t in part.values()) >= self._info.part_bytes:
                yield part
                part = {}
        if part:
            yield part
