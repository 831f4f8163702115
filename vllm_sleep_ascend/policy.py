# SPDX-License-Identifier: Apache-2.0
"""What happens to the memory of each tag at each level: one table, and the checks of names."""

from typing import Literal, get_args

Action = Literal["keep", "offload", "discard"]
PauseMode = Literal["abort", "wait", "keep"]
MODES: tuple[PauseMode, ...] = get_args(PauseMode)
Place = Literal["host", "disk"]  # of backups
PLACES: tuple[Place, ...] = get_args(Place)
_AND_TO = ", to="

GRAPHS = "cudagraph"  # vLLM's tag for what captured graphs use by themselves
# The tags of which every level does the same: runtime state and graph pools survive, scratch and KV
# cache do not. A tag that is not here is offloaded.
_EVERY_LEVEL: dict[str, Action] = {
    "runtime": "offload",
    GRAPHS: "offload",
    "kv_cache": "discard",
    "workspace": "discard",
    "sleep_persistent": "keep",  # vllm-ascend's: stays mapped
}
# (level, tag) -> action, by vLLM's contract. Of the weights, rank/sleeping.py saves what level 2
# must keep: buffers, preserved parameters, a draft.
POLICY: dict[int, dict[str, Action]] = {
    1: {"weights": "offload", **_EVERY_LEVEL},
    2: {"weights": "discard", **_EVERY_LEVEL},
}
LEVELS = (0, *POLICY)
# The tags whose content no level keeps.
SCRATCH_TAGS = tuple(tag for tag, action in _EVERY_LEVEL.items() if action == "discard")
# The tags that a wake may leave asleep; every other tag comes back with any wake.
DEFERRABLE_TAGS = ("weights", "kv_cache")
# Not memory: level 0 pauses scheduling alone, and this tag resumes it.
SCHEDULING_TAG = "scheduling"

# What the engine calls of its workers about sleep. Every rank does the same work.
OUR_CALLS = (
    *("sleep", "wake_up", "discard", "sleep_refusal", "sleeping_tags", "sleep_status"),
    *("weights_content", "set_weight_version", "synchronize_device"),
)
# Methods of a worker that touch no memory that sleeps. Any other is refused while weights sleep.
SAFE_CALLS = (
    *OUR_CALLS,
    *("check_health", "shutdown", "profile"),
    *("reset_mm_cache", "reset_encoder_cache", "list_loras", "get_supported_tasks"),
    *("init_weight_transfer_engine", "shutdown_weight_transfer_engine"),
    *("supports_draft_weight_updates", "get_model_inspection"),
    "get_kv_connector_handshake_metadata",  # vLLM 0.33 asks for it in a wake of the KV cache
)
# What the engine calls for each step, and does not while its memory sleeps.
STEP_CALLS = ("execute_model", "sample_tokens", "take_draft_token_ids")
# Methods that use the KV cache as well as the weights.
NEEDS_ALL = (
    *STEP_CALLS,
    *("execute_dummy_batch", "determine_available_memory", "initialize_from_config"),
    "compile_or_warm_up_model",
)
# What vLLM's worker does with weights: on sleeping memory each would fault the device.
NEEDS_WEIGHTS = (
    "reload_weights",
    "reset_weights",
    "mark_weights_loaded",
    "compute_weight_checksums",
    "save_sharded_state",
    "save_tensorized_model",
    "save_image",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "add_lora",
    "pin_lora",
    "remove_lora",
)
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(NEEDS_WEIGHTS, ("weights",)),
    **dict.fromkeys(NEEDS_ALL, DEFERRABLE_TAGS),
}


def check_level(level: object) -> int:
    """``level`` as it is.

    Raises:
        ValueError: it is not one of 0, 1 and 2.
    """
    if isinstance(level, bool) or not isinstance(level, int) or level not in LEVELS:
        raise ValueError(
            f"sleep level {level!r} does not exist; use 0 (pause scheduling), 1 (weights to host "
            "memory, KV cache discarded) or 2 (both discarded)"
        )
    return level


def check_mode(mode: object) -> PauseMode:
    """``mode`` as it is.

    Raises:
        ValueError: it is not one of vLLM's pause modes.
    """
    for known in MODES:
        if mode == known:
            return known
    raise ValueError(f"pause mode {mode!r} does not exist; use one of {', '.join(MODES)}")


def with_place(mode: PauseMode, place: Place | None) -> str:
    """Both in one word, because vLLM's clients hand an engine the mode of a sleep and no more."""
    return mode if place is None else f"{mode}{_AND_TO}{place}"


def split_place(mode: str) -> tuple[str, str | None]:
    """The mode and the place in such a word, unchecked."""
    alone, _, place = mode.partition(_AND_TO)
    return alone, place or None


def check_place(place: object, level: int) -> Place | None:
    """Where a sleep at this level puts backups; None: where the options say.

    Raises:
        ValueError: there is no such place, or the level has no use for one.
    """
    if place is None:
        return None
    for known in PLACES:
        if place == known:
            if level != 1:
                raise ValueError(
                    f"to={known!r} is where the backups of level 1 go, and the level is {level}; "
                    "use level 1, or leave out the place"
                )
            return known
    raise ValueError(f"to={place!r} is no place for backups; use one of {', '.join(PLACES)}")


def check_tags(tags: object) -> list[str] | None:
    """The tags in their order, each once; None stands for all.

    Raises:
        ValueError: a tag does not exist, or ``tags`` is no list.
    """
    if tags is None:
        return None
    allowed = (*DEFERRABLE_TAGS, SCHEDULING_TAG)
    if isinstance(tags, str):
        raise ValueError(f"tags must be a list, such as [{tags!r}], not the string {tags!r}")
    if not isinstance(tags, list | tuple | set | frozenset):
        raise ValueError(f"tags must be a list of some of {', '.join(allowed)}, not {tags!r}")
    for tag in tags:
        if not isinstance(tag, str) or tag not in allowed:
            raise ValueError(f"tag {tag!r} does not exist; use some of {', '.join(allowed)}")
    return list(dict.fromkeys(tags))
