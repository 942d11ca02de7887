"""FedProx: clients are pulled back to what the server sent them.

Li, Sahu, Zaheer, Sanjabi, Talwalkar & Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv
1812.06127. Each client minimises its loss + mu / 2 |w - w_server|^2 over the shared tensors. It composes with any
strategy that has shared tensors. The term's gradient, mu (w - w_server), holds no data: under DP it is added after clip
and noise and costs no privacy. The paper's inexact stopping rule, gamma, is not here: steps are ``train.local-steps``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from fedlora.local_terms import LocalTerms
from fedlora.roles import UP
from fedlora.strategy import Strategy
from strategies.wrapped import Wrapped, check_shared


@final
class FedProx(Wrapped):
    """Adds the proximal term to local training.

    Args:
        inner: The strategy.
        mu: The term's weight.

    Raises:
        ValueError: The strategy has no shared tensors.
    """

    def __init__(self, inner: Strategy, mu: float) -> None:
        super().__init__(inner)
        self.mu = mu
        check_shared(inner, "local.term = 'prox'", UP)

    def local(self, server_round: int) -> LocalTerms:
        """Return the inner strategy's terms with the proximal one."""
        return replace(self.inner.local(server_round), proximal=self.mu)
