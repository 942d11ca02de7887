"""The contract of a strategy: what each tensor's part in a round is, and what the server makes of the updates.

A strategy is pure: it imports neither Flower nor torch, holds no state of its own, and the same calls give the same
arrays. :mod:`fedlora.server` runs it under Flower. A whole federation of two clients by hand:

>>> import numpy as np
>>> from fedlora.methods import TensorSpec
>>> from fedlora.reduce import WeightedMean
>>> from fedlora.exchange import ClientReport, Update
>>> class OnlyB(Strategy):
...     name, methods, exact = "only-b", ("lora",), True
...     def roles(self, kinds, server_round):
...         return {kind: Role.SHARED if kind == "B" else Role.FROZEN for kind in kinds}
>>> specs = {"a": TensorSpec((1, 2), "A", ("layer",), 0.5), "b": TensorSpec((2, 1), "B", ("layer",), 0.0)}
>>> strategy = OnlyB(Setting(specs))
>>> state = strategy.initial({"a": np.ones((1, 2)), "b": np.zeros((2, 1))})
>>> list(state.tensors)
['b']
>>> total = WeightedMean()
>>> for client, (value, rows) in enumerate([(1.0, 30), (5.0, 10)]):
...     total.add(Update(ClientReport(client), {"b": np.full((2, 1), value)}), rows)
>>> strategy.apply(state, total.reduced(), server_round=1).tensors["b"].ravel().tolist()
[2.0, 2.0]
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from fedlora.config import Config
from fedlora.exchange import Tensors
from fedlora.local_terms import LocalTerms
from fedlora.methods import TensorSpec, zero_kinds
from fedlora.reduce import Reduced
from fedlora.roles import TRAINED, UP, Role, Roles, waits, with_role
from fedlora.shapes import at_rank, placed
from fedlora.state import ServerState

Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Setting:
    """What a strategy is made for.

    Attributes:
        specs: The method's tensors, at the server's rank.
        head: Role of the head.
        frozen: Kinds that stay as the seed gives them, whatever the strategy does with them.
        ranks: The rank that each client holds, at first where the strategy prunes ranks; empty: all hold the method's.
        config: The run's configuration, where a strategy reads its own keys: ``config.options(...)``.
    """

    specs: Specs
    head: Role = Role.SHARED
    frozen: frozenset[str] = frozenset()
    ranks: tuple[int, ...] = ()
    config: Config = field(default_factory=Config)

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of the method's tensors, head included, each once."""
        return list(dict.fromkeys(spec.kind for spec in self.specs.values()))

    @cached_property
    def computed(self) -> list[str]:
        """The kinds that the server computes before the first round."""
        return list(dict.fromkeys(spec.kind for spec in self.specs.values() if spec.computed))

    @property
    def whole(self) -> int:
        """The ranks of the server's tensors, of a method whose tensors have rank axes."""
        return max(spec.shape[spec.rank_axis] for spec in self.specs.values() if spec.rank_axis is not None)

    def rank(self, client: int | None) -> int | None:
        """Return the rank that a client holds; None: the method's."""
        return self.ranks[client] if self.ranks and client is not None else None


class Strategy(ABC):
    """A federated strategy; the defaults are federated averaging of every tensor.

    Args:
        setting: What it is made for.

    Raises:
        ValueError: In the first round a factor that starts at zero is fixed, and another is to be trained.
    """

    name: str
    """Its name in ``strategy.name``."""
    methods: tuple[str, ...]
    """Methods it works with; the first is what ``method.name = 'auto'`` stands for."""
    exact: bool | None
    """Whether the server's update is the mean of the clients' updates B A; None: it holds no whole update. Of a method
    whose update is not linear in what is trained it is not, whatever stands here."""
    personal: bool = False
    """Whether clients keep trained tensors of their own, so that there is no global model to measure."""
    period: int = 1
    """Rounds after which the roles repeat."""
    repeats: bool = True
    """Whether they do; else they are laid out over ``period`` rounds, and after them stay as in the last one."""
    ragged: bool = False
    """Whether clients may hold different ranks (``method.ranks``), of its first method or any that is ragged itself."""
    folds: bool = False
    """Whether a client of a smaller rank computes with all ranks, and trains as many of them (:meth:`modules`)."""
    prunes: bool = False
    """Whether a client's rank may fall from round to round, which makes bytes that follow from shapes the most."""
    accumulates: bool = False
    """Whether tensors grow by round beside the method's (:meth:`accumulated`)."""
    most_experts: int = 0
    """Experts that clients are sent at most, where their number is found from updates; 0: none are sent."""
    keeps_basis: bool = True
    """Whether a tensor's numbers mean the same in the next round, which a server optimizer's moments rest on."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        if setting.ranks and not self.ragged:
            raise ValueError(
                f"method.ranks: strategy {self.name!r} needs one rank for all clients; leave it empty, or choose a "
                "strategy for ranks by client, such as 'zero-padding'."
            )
        check_gradients(self)
        trained = self.trained_kinds
        if self.exact and not all(spec.linear for spec in setting.specs.values() if spec.kind in trained):
            self.exact = False

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a configuration in which the strategy would not do what its name promises.

        Raises:
            ValueError: What is wrong, with the cure.
        """
        return None

    @classmethod
    def laid_out(cls, config: Config) -> str:
        """Return the key, with its value, that lays roles out over all rounds of a run; empty: none does.

        A run of more rounds would be another one from its start, so such a run is not continued for more.
        """
        return ""

    def ranks(self, state: ServerState) -> tuple[int, ...]:
        """Return the rank that each client holds next, given what the server holds; empty: all hold the method's."""
        return self.setting.ranks

    def at(self, state: ServerState) -> Self:
        """Return the strategy as the state has it next, such as its clients' ranks; itself where that is no other."""
        ranks = self.ranks(state)
        if ranks == self.setting.ranks:
            return self
        now = copy(self)
        now.setting = replace(self.setting, ranks=ranks)
        return now

    @property
    def held(self) -> tuple[int, ...]:
        """The rank that each client computes with; empty: all compute with the method's."""
        return () if self.folds else self.setting.ranks

    def expert(self, client: int) -> int | None:
        """Return which of the experts that are sent is a client's own (:mod:`fedlora.experts`); None: none are sent."""
        return None

    def experts(self, clients: Sequence[int]) -> tuple[int, ...]:
        """Return the expert of each of these clients, as an instruction has them; empty: none are sent."""
        return tuple(expert for expert in map(self.expert, clients) if expert is not None)

    # -- clients ------------------------------------------------------------------------------------------

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return the role of each kind of the method's tensors in a round.

        The head's comes from the setting, unless a strategy names it here, too. Kinds that the server computes before
        the first round (``TensorSpec.computed``) are not asked for: they are ``broadcast`` under every strategy.
        """
        return dict.fromkeys(kinds, Role.SHARED)

    def rank(self, server_round: int, client: int | None = None) -> int | None:
        """Return the rank at which a client trains in a round: the one that it holds, or a smaller one; None: all."""
        return self.setting.rank(client)

    def specs(self, server_round: int, client: int | None = None) -> Specs:
        """Return the tensors of a client in a round, which follow from its rank; of the server, without a client."""
        return at_rank(self.setting.specs, self.rank(server_round, client))

    def modules(self, server_round: int, client: int) -> tuple[int, ...]:
        """Return the modules that a client trains in a round, by their places; empty: all that it holds.

        A module is one place of the method's rank axes: a row of A and the column of B that it is multiplied with, or
        one of Ravan's heads.
        """
        return ()

    def blocks(self, server_round: int) -> tuple[str, ...]:
        """Return the blocks of the base model whose shared tensors are trained in a round; empty: all of them.

        Those of other blocks are ``broadcast`` in it. What belongs to no one block goes by the role of its kind alone.
        """
        return ()

    def reduction(self, server_round: int) -> str:
        """Return how updates are reduced, a name in :data:`fedlora.reduce.REDUCTIONS`."""
        return "mean"

    def local(self, server_round: int) -> LocalTerms:
        """Return the terms of local training in a round."""
        return LocalTerms()

    def extra(self, server_round: int) -> Specs:
        """Return what clients and server send each other beside the tensors, named as ``ServerState.extra``."""
        return {}

    def accumulated(self, ranks: Sequence[int]) -> Specs:
        """Return the tensors that grow by round and are broadcast beside :meth:`sent`.

        Args:
            ranks: The ranks that have been added so far, of each layer; empty: none yet.
        """
        return {}

    def added_ranks(self, clients: Iterable[int], after: ServerState | None = None) -> tuple[int, ...]:
        """Return the ranks that a round adds to :meth:`accumulated`, of each layer.

        Args:
            clients: Those whose updates are in it.
            after: What :meth:`apply` has returned for it; None: before the round, where it is the most that it may be.
        """
        return ()

    # -- the server ---------------------------------------------------------------------------------------

    def initial(self, seeded: Tensors) -> ServerState:
        """Return what the server holds before the first round, given what the seed gives."""
        return ServerState({name: seeded[name] for name in self.sent(1)})

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the server's state after a round; by default the mean replaces what was there.

        Ranks that no client of the round holds stay as they were.
        """
        mean = {name: placed(value, state.tensors[name]) for name, value in reduced.mean.items()}
        return replace(state, tensors={**state.tensors, **mean})

    def changed(self, server_round: int) -> set[str]:
        """Return the kinds of exchanged tensors that the server changes after a round.

        Those that are shared in it, unless :meth:`apply` changes others. After round 0: those that do not start as the
        seed gives them.
        """
        if not server_round:
            return set(self.setting.computed)
        return {kind for kind, role in self.all_roles(server_round).items() if role is Role.SHARED}

    # -- what follows from the roles ----------------------------------------------------------------------

    def all_roles(self, server_round: int) -> dict[str, Role]:
        """Return the role of every kind, head included."""
        kinds = self.setting.kinds
        computed = self.setting.computed
        own = [kind for kind in kinds if kind != "head" and kind not in computed]
        roles = {"head": self.setting.head, **self.roles(own, server_round), **dict.fromkeys(computed, Role.BROADCAST)}
        return {kind: Role.FROZEN if kind in self.setting.frozen else roles[kind] for kind in kinds}

    def with_role(self, server_round: int, *wanted: Role, client: int | None = None) -> dict[str, TensorSpec]:
        """Return the tensors that have one of the ``wanted`` roles in a round."""
        roles, blocks = self.all_roles(server_round), self.blocks(server_round)
        return with_role(self.specs(server_round, client), roles, *wanted, blocks=blocks)

    def sent(self, server_round: int, client: int | None = None) -> dict[str, TensorSpec]:
        """Return the tensors that a client is sent in a round."""
        return self.with_role(server_round, Role.SHARED, Role.BROADCAST, client=None if self.folds else client)

    def measured(self, server_round: int, client: int | None = None) -> dict[str, TensorSpec]:
        """Return the tensors that a client is sent to measure what the round starts with, with all ranks that it holds.

        Those of :meth:`sent`, unless the round trains fewer ranks.
        """
        sent, rank = self.sent(server_round, client), None if self.folds else self.setting.rank(client)
        whole = at_rank(self.setting.specs, rank)
        return {name: whole[name] if spec.rank_axis is not None else spec for name, spec in sent.items()}

    def renewed(self, server_round: int) -> set[str]:
        """Return the names of the tensors that the server changes after a round (:meth:`changed`)."""
        kinds, blocks = self.changed(server_round), self.blocks(server_round) if server_round else ()
        return {n for n, spec in self.setting.specs.items() if spec.kind in kinds and not waits(spec, blocks)}

    def expected(self, server_round: int, client: int | None = None) -> dict[str, TensorSpec]:
        """Return the tensors that a client sends back in a round."""
        return self.with_role(server_round, *UP, client=client)

    def roles_in_turn(self) -> dict[str, list[Role]]:
        """Return the roles of each kind in the rounds of a cycle."""
        rounds = [self.all_roles(number) for number in range(1, self.period + 1)]
        return {kind: [roles[kind] for roles in rounds] for kind in rounds[0]}

    @property
    def trained_kinds(self) -> set[str]:
        """The kinds that clients train in some round."""
        return {kind for kind, roles in self.roles_in_turn().items() if set(TRAINED) & set(roles)}

    @property
    def has_personal(self) -> bool:
        """Whether clients keep trained tensors in some round: the strategy's personal ones, or the head."""
        return any(Role.PERSONAL in roles for roles in self.roles_in_turn().values())


def check_gradients(strategy: Strategy) -> None:
    """Refuse roles that let nothing train: a factor fixed at zero hides every gradient that it is multiplied with.

    Raises:
        ValueError: In some round a factor that still has its start at zero is fixed, and another is to be trained.
    """
    ever: set[str] = set()
    products = zero_kinds(strategy.setting.specs)
    for number in range(1, strategy.period + 1):
        now = {kind for kind, role in strategy.all_roles(number).items() if role in TRAINED}
        ever |= now
        for product, kinds in products.items():
            dead = [kind for kind, zero in kinds.items() if zero]
            hidden = [kind for kind, zero in kinds.items() if not zero and kind in now]
            if dead and hidden and not ever & set(dead):
                raise ValueError(
                    f"strategy {strategy.name!r} trains {hidden[0]} of {product} in round {number} while {dead[0]}, "
                    f"which it is multiplied with, is fixed at zero: nothing would be learned. Train {dead[0]} first."
                )
