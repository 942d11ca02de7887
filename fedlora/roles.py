"""The roles that a strategy gives to tensors, by kind."""

from __future__ import annotations

from collections.abc import Mapping
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


def with_role(specs: Mapping[str, TensorSpec], roles: Roles, *wanted: Role) -> dict[str, TensorSpec]:
    """Return the tensors whose kind has one of the ``wanted`` roles, in the order of ``specs``."""
    return {name: spec for name, spec in specs.items() if roles[spec.kind] in wanted}
