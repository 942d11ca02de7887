"""The tensors that clients start a round with, by role: sent, kept, drawn anew, or as the seed gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from clients.errors import RefusedError
from clients.personal import PersonalStore
from clients.resident import LoadedModel
from fedlora.exchange import Instruction
from fedlora.experts import copied
from fedlora.methods import TensorSpec, initial_tensors
from fedlora.roles import TRAINED, UP, Role, with_role
from fedlora.seeded import Seeded
from fedlora.shapes import at_rank, chosen, cut

Arrays = dict[str, NDArray[np.floating]]

VARIATE = "variate/"
"""Begins the names of control variates, in what is sent beside the tensors and in what a client keeps."""


@final
@dataclass(frozen=True)
class StartTensors:
    """What clients start a round with.

    Attributes:
        model: The model.
        store: What the clients keep between rounds.
    """

    model: LoadedModel
    store: PersonalStore
    _of_roles: dict[tuple[object, ...], dict[str, TensorSpec]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def common(self, instruction: Instruction) -> Arrays:
        """Return the tensors that all clients have alike, at the method's rank.

        Tensors that are sent and are none of the method's (FLoRA's residual) are among them as they came.
        """
        fresh = self._with_role(instruction, Role.UPLOAD)
        config = self.model.config
        drawn = initial_tensors(fresh, Seeded(config.seed), config.engine.tensor_dtype, instruction.round)
        return {**self.model.initial, **instruction.tensors, **drawn}

    def trained(self, instruction: Instruction) -> dict[str, TensorSpec]:
        """Return the tensors that clients train."""
        return self._with_role(instruction, *TRAINED)

    def sent_up(self, instruction: Instruction) -> dict[str, TensorSpec]:
        """Return the tensors that clients send."""
        return self._with_role(instruction, *UP)

    def personal(self, instruction: Instruction) -> dict[str, TensorSpec]:
        """Return the tensors that clients train and keep."""
        return self._with_role(instruction, Role.PERSONAL)

    def kept(self, instruction: Instruction, client: int) -> Arrays:
        """Return what a client kept for the round: personal tensors, and control variates; empty if nothing."""
        if not self.personal(instruction) and not instruction.local.scaffold:
            return {}
        return self.store.load(client, instruction.round) or {}

    def expert(self, instruction: Instruction, client: int, common: Arrays) -> Arrays:
        """Return what a client has for itself of the experts in ``common`` (:mod:`fedlora.experts`); empty: no experts.

        Raises:
            RefusedError: Its expert is none of those that were sent.
        """
        place = instruction.expert(client)
        try:
            return {} if place is None else copied(common, place)
        except ValueError as error:
            raise RefusedError(str(error)) from None

    def of(self, instruction: Instruction, client: int, common: Arrays) -> Arrays:
        """Return what a client trains as it starts the round, at its own rank; ``common`` is :meth:`common`."""
        values = {**common, **self.expert(instruction, client, common), **self.kept(instruction, client)}
        modules = instruction.modules_of(client)
        held = at_rank(self.trained(instruction), instruction.rank(client))
        return {name: chosen(cut(values[name], spec.shape), spec.rank_axis, modules) for name, spec in held.items()}

    def fixed(self, instruction: Instruction, client: int, common: Arrays) -> Arrays:
        """Return what a client does not train and others have otherwise.

        What the modules come to that it does not train, or which of the experts is its own.
        """
        modules, trained = instruction.modules_of(client), self.trained(instruction)
        if not modules:
            own = self.expert(instruction, client, common)
            return {name: value for name, value in own.items() if name not in trained}
        others = {name: spec for name, spec in self.model.specs.items() if spec.rank_axis is not None}
        own = {
            name: chosen(common[name], spec.rank_axis, modules) for name, spec in others.items() if name not in trained
        }
        return {**own, **self.model.engine.method.folded(common, modules)}

    def shared(self, instruction: Instruction) -> dict[str, TensorSpec]:
        """Return the tensors that clients train and exchange: those that the server holds a value of."""
        return self._with_role(instruction, Role.SHARED)

    def server_variate(self, instruction: Instruction, client: int) -> Arrays:
        """Return the server's control variate, at a client's rank; empty without SCAFFOLD."""
        if not instruction.local.scaffold:
            return {}
        sent, held = variates(instruction.extra), at_rank(self.shared(instruction), instruction.rank(client))
        return {name: cut(sent[name], spec.shape) for name, spec in held.items()}

    def own_variate(self, instruction: Instruction, client: int) -> Arrays:
        """Return a client's control variate as it starts the round, at its own rank: at first zero."""
        kept = variates(self.kept(instruction, client))
        server = self.server_variate(instruction, client)
        return {name: kept.get(name, np.zeros_like(value)) for name, value in server.items()}

    def personal_of(self, instruction: Instruction, client: int, common: Arrays) -> Arrays:
        """Return what is a client's own as it starts the round: personal tensors, its expert, what has its own rank."""
        expert, rank = self.expert(instruction, client, common), instruction.rank(client)
        values = {**common, **expert, **self.kept(instruction, client)}
        own = self.personal(instruction) | {name: self.model.specs[name] for name in expert}
        if rank is not None:
            own = own | {name: spec for name, spec in self.model.specs.items() if spec.rank_axis is not None}
        return {name: cut(values[name], spec.shape) for name, spec in at_rank(own, rank).items()}

    def _with_role(self, instruction: Instruction, *roles: Role) -> dict[str, TensorSpec]:
        blocks = instruction.blocks
        key = (*instruction.roles.items(), blocks, roles)
        if key not in self._of_roles:  # asked several times a client, with hundreds of tensors
            self._of_roles[key] = with_role(self.model.specs, instruction.roles, *roles, blocks=blocks)
        return self._of_roles[key]


def variates(tensors: Mapping[str, NDArray[np.floating]]) -> Arrays:
    """Return the control variates among tensors, by the name of the tensor that each belongs to."""
    return {name.removeprefix(VARIATE): value for name, value in tensors.items() if name.startswith(VARIATE)}
