# SPDX-License-Identifier: Apache-2.0
"""The options of ``additional_config={"sleep_mode": {...}}`` (``--additional-config``)."""

import os
import tempfile
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.policy import Place

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from vllm.config import VllmConfig

KEY = "sleep_mode"
IMAGE_FORMAT = "sleep_image"  # vLLM's load_format for a saved image
LOOPBACK = "127.0.0.1"

_SOCKET_PATH_BYTES = 107  # of Linux's sockaddr_un, without the final zero
_UNSHOWN = "admin_key_file"  # which may be given the key itself by mistake


class SleepModeConfig(BaseModel):
    """How memory sleeps and wakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    keep_host_backup: bool = Field(default=True)
    """Keep the pinned host memory, or the file, of a backup after the wake, so that the next sleep
    has it."""

    chunk_mib: int = Field(default=64, ge=2, le=4096, multiple_of=2)
    """MiB of device memory that are taken, copied and given back at a time; of what is never copied
    (KV cache, workspace) 1024, or this if it is more."""

    wake_timeout_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds that a wake, and each step of a start, waits for device memory that another process
    still holds. A start beside vllm-ascend does not wait."""

    host_backup: Literal["auto", "on_demand", "prepared", "disk"] = Field(default="auto")
    """When the page-locked memory of a level-1 backup is taken. "disk": never, the backup is a file
    in ``backup_dir``. "on_demand": by the first sleep, or
    behind it where plain memory is faster to have. "prepared": by many threads as soon as the
    engine is ready to serve. "auto": then too, by one thread that rests half of the time, if the
    host has twice what all ranks on it need and backups are kept; level 2 gives it back. While the
    engine runs steps, block by block with long rests."""

    host_memory: Literal["auto", "acl", "registered"] = Field(default="auto")
    """Where page-locked memory comes from. "acl": aclrtMallocHost. "registered": mapped, locked and
    registered, which Linux keeps in place from 5.19 on; elsewhere aclrtMallocHost is used. "auto":
    registered where it can be and copies from and to it were tried, else aclrtMallocHost, which
    also takes over once a block cannot be locked or registered."""

    backup_dir: str | None = Field(default=None)
    """The directory of backups on disk, on each host of the engine: of ``host_backup="disk"``, and
    of those that a call or ``to_disk_after_s`` moves there. A file there has no name, and ends with
    the process."""

    disk_blocks_mib: int = Field(default=256, ge=16, le=1024, multiple_of=16)
    """MiB of page-locked memory, on each rank, through which backups go to the disk and back; as
    many requests of 8 MiB are in flight as half of it holds."""

    image_dir: str | None = Field(default=None)
    """With ``--load-format sleep_image``: the directory of a saved image, on each host of the
    engine, from which it starts."""

    skip_unchanged: bool = Field(default=False)
    """Copy only allocations whose checksum changed since the backup that is kept."""

    verify_wake: bool = Field(default=False)
    """Compare checksums after a wake that copied memory back. The checksums also tell what need
    not be copied, as with skip_unchanged."""

    after_level2: Literal["warn", "refuse", "reload"] = Field(default="refuse")
    """What happens when weights wake from level 2, where they were discarded. "refuse": the engine
    serves once every parameter has been written, by whatever way; requests are refused until then.
    "reload": the wake loads them from the checkpoint, and fails if it cannot load all, or if
    they came from elsewhere. "warn": the engine serves whatever is there, with one warning."""

    while_asleep: Literal["wait", "refuse"] = Field(default="wait")
    """What becomes of new generation requests while the engine sleeps. "wait": they are queued.
    "refuse": the server answers 503 with Retry-After, and AsyncLLM raises."""

    calls_while_asleep: Literal["refuse", "allow"] = Field(default="refuse")
    """What becomes of calls of the workers (collective_rpc, apply_model) that may touch the weights
    while those sleep. "refuse": an error before anything runs. "allow": they run, and one that
    touches the weights ends the process. Methods of vLLM that use them are refused always."""

    release_communicators: bool = Field(default=False)
    """Give back the device memory of HCCL's communicators while the engine sleeps, and make them
    again at the wake. vLLM's enable_nccl_comm_suspend does the same."""

    rank_timeout_s: float = Field(default=120.0, ge=1, le=86400, allow_inf_nan=False)
    """Seconds that a rank that is ready to sleep or to wake waits for the slowest one. Then the
    operation fails, on every rank that answers. HCCL_CONNECT_TIMEOUT comes on top where
    communicators are made again, and so does wake_timeout_s. After an error of one rank in another
    call (collective_rpc) the others have about as long, or the engine ends; but as long as they
    need in reload_weights, save_image, save_sharded_state and save_tensorized_model."""

    device_timeout_s: float = Field(default=60.0, ge=0.001, le=86400, allow_inf_nan=False)
    """Seconds that a copy may take beyond what the slowest link needs, and that a sleep waits for
    what runs on the device. Then the operation fails, and everything is as it was. At most
    rank_timeout_s, and by default at most half of it: the other ranks wait to hear of it. Copies
    from and to memory of which nothing is page-locked are synchronous ones, which AscendCL does not
    limit; nor does it limit how long torch's queue takes to launch."""

    preserve_parameters: list[str] = Field(default=[])
    """Beside vllm-ascend: patterns of the names of parameters that level 2 keeps on the host, as
    vLLM's own sleep_preserve_parameter_names, which vLLM 0.23 lacks."""

    idle_sleep_s: float | None = Field(default=None, ge=0.1, allow_inf_nan=False)
    """Seconds without work after which an engine in a process of its own falls asleep; None: never.
    Each failure doubles them, up to 64 times the value, until there is work again."""

    idle_level: Literal[1, 2] = Field(default=1)
    """The level of that sleep. 2 needs after_level2="reload"; weights that are in no checkpoint
    sleep at level 1."""

    to_disk_after_s: float | None = Field(default=None, ge=0.1, allow_inf_nan=False)
    """Seconds of sleep at level 1 after which an engine in a process of its own moves its backup
    from host memory to ``backup_dir``; None: never. Each failure doubles them, up to 64 times the
    value, until it sleeps anew."""

    wake_on_request: bool = Field(default=False)
    """A request wakes the engine, whoever put it to sleep; from level 2 with after_level2="reload"
    alone. If that fails it gets the reason, from a server with 503."""

    admin_port: int | None = Field(default=None, ge=1, le=65535)
    """A server's admin door: the sleep endpoints, status and metrics on a port of their own,
    without vLLM's development mode."""

    admin_host: str = Field(default=LOOPBACK, min_length=1)
    """The address of ``admin_port``. One that other machines reach needs a key."""

    admin_socket: str | None = Field(default=None)
    """The same door at the path of a Unix socket, which only the server's user may open."""

    admin_key_file: str | None = Field(default=None)
    """A file with the door's key, which only the server's user may read. Without it the key is that
    of the environment (``admin_key.VARIABLE``), if there is one."""

    @model_validator(mode="after")
    def _requests_can_be_served(self) -> "SleepModeConfig":
        if "idle_level" in self.model_fields_set and self.idle_sleep_s is None:
            raise ValueError("idle_level needs idle_sleep_s")
        if self.idle_level == 2 and self.after_level2 != "reload":
            raise ValueError(
                f"idle_level=2 discards the weights, and after_level2={self.after_level2!r} loads "
                "none at the wake; set after_level2='reload', or idle_level=1"
            )
        if self.wake_on_request and self.while_asleep == "refuse":
            raise ValueError(
                "wake_on_request and while_asleep='refuse' exclude each other; choose one"
            )
        return self

    @field_validator("admin_socket", "admin_key_file", "backup_dir", "image_dir")
    @classmethod
    def _is_absolute(cls, path: str | None) -> str | None:
        if path is not None and not os.path.isabs(path):
            raise ValueError("an absolute path is needed, such as /run/vllm/NAME")
        return path

    @field_validator("admin_socket")
    @classmethod
    def _fits_a_socket(cls, path: str | None) -> str | None:
        if path is not None and len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
            raise ValueError(f"a socket's path has at most {_SOCKET_PATH_BYTES} bytes")
        return path

    @model_validator(mode="after")
    def _one_door(self) -> "SleepModeConfig":
        if self.admin_port is not None and self.admin_socket is not None:
            raise ValueError("admin_port and admin_socket exclude each other; choose one")
        if "admin_host" in self.model_fields_set and self.admin_port is None:
            raise ValueError("admin_host needs admin_port")
        if self.admin_key_file is not None and not self.has_door:
            raise ValueError("admin_key_file needs admin_port or admin_socket")
        return self

    def check_backup_dir(self) -> None:
        """At the start of a rank, on its host. Later a wake from the file does not need it.

        Raises:
            ValueError: the directory does not exist, or this user cannot write in it.
        """
        if self.backup_dir is None:
            return
        try:
            with tempfile.TemporaryFile(dir=self.backup_dir):
                pass
        except OSError as error:
            named = f"additional_config[{KEY!r}]: backup_dir={self.backup_dir!r}"
            raise ValueError(
                f"{named}: no file can be created in it ({error.strerror}); name a directory on a "
                "fast disk, on every host of the engine, in which this user may write"
            ) from None

    @property
    def place(self) -> Place:
        """Where backups go if a call does not say."""
        return "disk" if self.host_backup == "disk" else "host"

    def check_place(self, place: Place | None) -> None:
        """
        Raises:
            ValueError: backups cannot go there.
        """
        if place == "disk" and self.backup_dir is None:
            raise ValueError(
                f"to='disk' needs the option backup_dir of additional_config[{KEY!r}], a directory "
                "on a fast disk; restart the engine with it, or use to='host'"
            )

    @property
    def has_door(self) -> bool:
        return self.admin_port is not None or self.admin_socket is not None

    @property
    def door_is_local(self) -> bool:
        """Whether only this machine reaches the door."""
        return self.admin_socket is not None or admin_key.is_loopback(self.admin_host)

    @model_validator(mode="after")
    def _unchanged_needs_a_backup(self) -> "SleepModeConfig":
        if self.skip_unchanged and not self.keep_host_backup:
            raise ValueError("skip_unchanged needs the backup that keep_host_backup=false gives up")
        return self

    @model_validator(mode="after")
    def _disk_has_a_directory(self) -> "SleepModeConfig":
        if self.host_backup == "disk" and self.backup_dir is None:
            raise ValueError("host_backup='disk' needs backup_dir, a directory on a fast disk")
        if self.to_disk_after_s is not None and self.backup_dir is None:
            raise ValueError("to_disk_after_s needs backup_dir, a directory on a fast disk")
        if self.to_disk_after_s is not None and self.host_backup == "disk":
            raise ValueError(
                "to_disk_after_s moves backups from host memory to disk, where host_backup='disk' "
                "puts them at once; leave out one of them"
            )
        if "disk_blocks_mib" in self.model_fields_set and self.backup_dir is None:
            raise ValueError("disk_blocks_mib needs backup_dir, a directory on a fast disk")
        return self

    @model_validator(mode="after")
    def _other_ranks_wait_for_the_device(self) -> "SleepModeConfig":
        if "device_timeout_s" not in self.model_fields_set:
            half = min(self.device_timeout_s, self.rank_timeout_s / 2)
            object.__setattr__(self, "device_timeout_s", half)  # it is frozen
        elif self.device_timeout_s > self.rank_timeout_s:
            raise ValueError(
                f"device_timeout_s={self.device_timeout_s:g} is more than rank_timeout_s="
                f"{self.rank_timeout_s:g}: the other ranks would give up before the device does; "
                "lower the first or raise the second"
            )
        return self

    @classmethod
    def releases_communicators(cls, vllm_config: "VllmConfig") -> bool:
        """By this package's option, vLLM's or vllm-ascend's."""
        own = cls.from_vllm_config(vllm_config).release_communicators
        # vLLM 0.23 has no such option.
        vllms = bool(getattr(vllm_config.model_config, "enable_nccl_comm_suspend", False))
        return own or vllms or cls.cleans_up_extra(vllm_config)

    @classmethod
    def cleans_up_extra(cls, vllm_config: "VllmConfig") -> bool:
        """By vllm-ascend's option, which drops captured graphs and captures them again. Later than
        0.23, vllm-ascend has it in ``rl_config``."""
        additional: Any = vllm_config.additional_config or {}
        rl_config = additional.get("rl_config")
        moved = isinstance(rl_config, dict) and rl_config.get("enabled")
        return bool(
            additional.get("enable_sleep_mode_extra_cleanup")
            or (moved and rl_config.get("sleep_mode_extra_cleanup"))
        )

    @classmethod
    def slowest_rank_s(cls, vllm_config: "VllmConfig") -> float:
        """Seconds after which a rank that did not come has to be taken for hanging."""
        connect_s = connect_timeout_s() if cls.releases_communicators(vllm_config) else 0
        config = cls.from_vllm_config(vllm_config)
        return config.rank_timeout_s + config.wake_timeout_s + connect_s

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "SleepModeConfig":
        """The options of this engine.

        Raises:
            ValueError: an option or a value that does not exist; names it and what is allowed.
        """
        additional: Any = vllm_config.additional_config or {}
        options = additional.get(KEY, {})
        if not isinstance(options, dict):
            raise ValueError(f"additional_config[{KEY!r}] must be a mapping, not {options!r}")
        try:
            return cls(**options)
        except ValidationError as error:
            problems = "; ".join(map(_described, error.errors()))
            raise ValueError(
                f"additional_config[{KEY!r}]: {problems}. "
                f"The options are {', '.join(cls.model_fields)}."
            ) from None


def _described(problem: "ErrorDetails") -> str:
    """What is wrong, with the value, unless it may be a key."""
    name, message = ".".join(map(str, problem["loc"])), problem["msg"]
    if name == "admin_key":
        return (
            "admin_key: not an option, because a configuration is printed in logs and in lists of "
            f"processes; set {admin_key.VARIABLE} in the environment, or admin_key_file"
        )
    if not name:
        return message
    if name == _UNSHOWN or (problem["type"] == "extra_forbidden" and "key" in name):
        return f"{name}: {message}"
    return f"{name}={problem['input']!r}: {message}"


def connect_timeout_s() -> int:
    """How long HCCL lets ranks wait for each other while they make a communicator."""
    return int(os.environ.get("HCCL_CONNECT_TIMEOUT") or 120)


def check_enabled(vllm_config: "VllmConfig") -> None:
    """
    Raises:
        ValueError: the engine was started without sleep mode.
    """
    if not vllm_config.model_config.enable_sleep_mode:
        raise ValueError(
            "sleep mode is not enabled; start the engine with LLM(..., enable_sleep_mode=True) or "
            "vllm serve --enable-sleep-mode"
        )
