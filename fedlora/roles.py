"""The roles that a strategy gives to tensors, by kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.methods import TensorSpec


class Role(StrEnum):
    """What happens to a tensor in a round."""

    SHARED = "shared"
    """Trained and exchanged."""
    PERSONAL = "personal"
    """Trained and kept by the client."""
    FROZEN = "frozen"
    """Equal to what the seed gives, always; never sent."""
    BROADCAST = "broadcast"
    """Not trained this round, but the server holds a newer value than the client, so it is sent."""
    UPLOAD = "upload"
    """Trained from a fresh start in each round and sent to the server, which never sends it: from what the seed gives
    for the round, or from a copy of the client's expert (:mod:`fedlora.experts`)."""


Roles = Mapping[str, Role]
UP = (Role.SHARED, Role.UPLOAD)
"""Roles of the tensors that a client sends."""
TRAINED = (*UP, Role.PERSONAL)
"""Roles of the tensors that a client trains."""


def with_role(
    specs: Mapping[str, TensorSpec], roles: Roles, *wanted: Role, blocks: Collection[str] = ()
) -> dict[str, TensorSpec]:
    """Return the tensors that have one of the ``wanted`` roles, in the order of ``specs``.

    Args:
        specs: The tensors.
        roles: The role of each kind.
        wanted: The roles.
        blocks: The blocks whose shared tensors are trained; those of others are ``broadcast``. Empty: all blocks.
    """

    def role(spec: TensorSpec) -> Role:
        own = roles[spec.kind]
        return Role.BROADCAST if own is Role.SHARED and waits(spec, blocks) else own

    return {name: spec for name, spec in specs.items() if role(spec) in wanted}


def waits(spec: TensorSpec, blocks: Collection[str]) -> bool:
    """Return whether a tensor is of a block that is not among those that are trained (empty: all are)."""
    return bool(blocks and spec.block) and spec.block not in blocks
