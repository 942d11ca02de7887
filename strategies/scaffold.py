"""SCAFFOLD: control variates take the drift out of the clients' steps.

Karimireddy, Kale, Mohri, Reddi, Stich & Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, arXiv 1910.06378. Each client steps y <- y - eta (g(y) - c_k + c), with its own variate c_k and the server's
c, and renews it:

- option I: c_k+ = the gradient of all its rows at the server's x;
- option II: c_k+ = c_k - c + (x - y) / (sum of the learning rates of its steps).

It sends c_k+ - c_k beside its update; the server takes the mean x of the updates and
c <- c + |S| / N mean(c_k+ - c_k). c is exchanged beside the shared tensors and doubles their bytes; c_k never leaves
the client. All variates start at zero.

The algebra is that of plain SGD: with AdamW, momentum, weight decay or a clip (x - y) / eta is no mean of gradients, so
these are refused. Under DP option II renews c_k from a noised update, which costs nothing more; option I would read the
rows once more without noise and is refused. It composes with strategies that average in a fixed basis.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import numpy as np

from fedlora.exchange import Tensors
from fedlora.local_terms import LocalTerms
from fedlora.reduce import Reduced
from fedlora.roles import Role
from fedlora.state import ServerState
from fedlora.strategy import Specs, Strategy
from strategies.wrapped import Wrapped, check_shared

VARIATE = "variate"


@final
class Scaffold(Wrapped):
    """Adds control variates of the shared tensors to local training.

    Args:
        inner: The strategy.
        num_clients: N, all clients of the federation.
        option: How clients renew their variates, 1 or 2.

    Raises:
        ValueError: The strategy's shared tensors have no variates that outlive a round.
    """

    def __init__(self, inner: Strategy, num_clients: int, option: int) -> None:
        super().__init__(inner)
        self.num_clients, self.option = num_clients, option
        if not inner.keeps_basis or inner.reduction(1) != "mean" or inner.rank(1, 0) is not None:
            raise ValueError(
                f"local.term = 'scaffold': strategy {inner.name!r} does not average in a fixed basis at one rank, so a "
                "control variate of one round means nothing in the next; choose a strategy that averages, such as "
                "'fedavg' or 'ffa-lora', with one rank for all clients."
            )
        check_shared(inner, "local.term = 'scaffold'")
        if any(spec.l1 for spec in self.extra(1).values()):
            raise ValueError(
                f"local.term = 'scaffold': strategy {inner.name!r} takes proximal steps on what it averages, which a "
                "control variate would take for gradients; set its sparsity to 0, or local.term = 'none'."
            )

    def local(self, server_round: int) -> LocalTerms:
        """Return the inner strategy's terms with control variates."""
        return replace(self.inner.local(server_round), scaffold=self.option)

    def extra(self, server_round: int) -> Specs:
        """Return a control variate for each tensor that is shared in the round."""
        shared = self.inner.with_role(server_round, Role.SHARED)
        return {**self.inner.extra(server_round), **{f"{VARIATE}/{name}": spec for name, spec in shared.items()}}

    def initial(self, seeded: Tensors) -> ServerState:
        """Return the inner strategy's start, with variates of zero."""
        state = self.inner.initial(seeded)
        names = [name for number in range(1, self.period + 1) for name in self.inner.with_role(number, Role.SHARED)]
        zeros = {f"{VARIATE}/{name}": np.zeros_like(seeded[name]) for name in names}
        return replace(state, extra={**state.extra, **zeros})

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the inner strategy's state with the server's variates renewed."""
        after, share = self.inner.apply(state, reduced, server_round), reduced.count / self.num_clients
        renewed = {
            name: (state.extra[name] + share * change).astype(state.extra[name].dtype)
            for name, change in reduced.extra.items()
        }
        return replace(after, extra={**after.extra, **renewed})
