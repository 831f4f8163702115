# SPDX-License-Identifier: Apache-2.0
"""Groups of models in models.yaml."""

from pydantic import BaseModel, ConfigDict

from vllm_sleep_ascend.proxy.config.model import Flag, Names


class GroupEntry(BaseModel):
    """A group's entry.

    members: names of models; each is in one group at most.
    swap: at most one of them is awake at a time.
    exclusive: waking one of them puts all others to sleep that are in no persistent group.
    persistent: none of them is put to sleep for a model that is not one of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: Names
    swap: Flag = False
    exclusive: Flag = False
    persistent: Flag = False


class Group(GroupEntry):
    """A group with its name."""

    name: str
