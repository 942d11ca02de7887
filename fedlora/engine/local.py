"""What a strategy adds to the clients' steps, for a whole pack at once: FedProx, SCAFFOLD, HetLoRA's penalty.

All are terms of the gradient that see no data. Without DP they are part of it before ``train.clip-norm`` is applied,
since those of FedProx and HetLoRA belong to the objective; under DP they come after clip and noise, and cost no
privacy.

FedProx (Li et al., MLSys 2020, arXiv 1812.06127) adds ``mu (y - x)`` for the client's y and the server's x.
SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378) adds ``c - c_k``, the server's variate less the client's
own, and renews that after the round: with option 1 ``c_k+ = grad f_k(x)``, the gradient of the client's whole objective
at the server's x; with option 2 ``c_k+ = c_k - c + (x - y) / sum of its learning rates``. A client that took no step
keeps its variate.

HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432) adds ``lambda |B[:, f:]|_F |A[f:]|_F`` of each layer to the
objective, with f = floor(gamma r) and r the client's own rank; where a norm is zero, so is its part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from fedlora.engine.stack import Stack
from fedlora.local_terms import LocalTerms, tail
from fedlora.methods.products import Pair
from fedlora.transfer import Places

NO_TERMS = LocalTerms()


@final
class LocalGradient:
    """The terms of local training, as numbers of a pack.

    Args:
        stack: The pack's tensors, before the first step.
        terms: What the strategy asks for.
        shared: Names of the tensors that the terms apply to.
        server_g: Rows of the server's control variate, [G, P].
        own_g: Rows of the clients' own ones, [G, P].
        pairs: The layers whose A and B are both shared.
        ranks: The rank that each group holds, [G]; read with a penalty only.
    """

    def __init__(
        self,
        stack: Stack,
        terms: LocalTerms,
        shared: Sequence[str],
        server_g: Tensor,
        own_g: Tensor,
        pairs: Sequence[Pair] = (),
        ranks: Sequence[int] = (),
    ) -> None:
        self._stack, self._pairs = stack, pairs
        first_g = torch.tensor([tail(rank, terms.decay) for rank in ranks], device=stack.values.device)
        self._first_g1 = first_g[:, None]
        self._terms = terms
        self._shared_p = stack.spread(dict.fromkeys(shared, 1.0)) != 0
        self._start = stack.values.clone()
        self._server_g = server_g
        self._own_g = own_g

    def add(self, grads: Tensor, values: Tensor, groups: Places) -> None:
        """Add the terms to the gradients of some groups, in place.

        Args:
            grads: Their gradients, [a, P].
            values: The numbers of all groups, [G, P].
            groups: The groups' places.
        """
        if self._terms.proximal:
            moved = values[groups] - self._start[groups]
            grads.add_(torch.where(self._shared_p, moved, 0.0), alpha=self._terms.proximal)
        if self._terms.scaffold:
            grads.add_(torch.where(self._shared_p, self._server_g[groups] - self._own_g[groups], 0.0))
        if self._terms.penalty:
            self._add_penalty(self._stack.named(grads), self._stack.named(values[groups]), self._first_g1[groups])

    def _add_penalty(self, grads: dict[str, Tensor], values: dict[str, Tensor], first_g1: Tensor) -> None:
        """Add the gradient of HetLoRA's penalty to views of the gradients; padding is zero, and so is its part."""
        for _, name_a, name_b in self._pairs:
            a, b = values[name_a], values[name_b]  # [a, r, d_in], [a, d_out, r]
            last = torch.arange(a.shape[-2], device=a.device) >= first_g1  # [a, r]
            a, b = a * last[:, :, None], b * last[:, None, :]
            norm_a, norm_b = (torch.linalg.vector_norm(one, dim=(1, 2), keepdim=True) for one in (a, b))
            for name, own, norm, other in ((name_a, a, norm_a, norm_b), (name_b, b, norm_b, norm_a)):
                slope = torch.where(norm > 0, other / norm, 0.0)
                grads[name].add_(slope * own, alpha=self._terms.penalty)

    def renewed(self, values: Tensor, rates_g: Tensor, whole: Tensor | None) -> Tensor:
        """Return the clients' control variates after the round, [G, P].

        Args:
            values: Their tensors now, [G, P].
            rates_g: The sum of the learning rates of each client's steps, [G]; zero for one that took none.
            whole: For option 1 the gradients of their whole objectives at the start, [G, P].
        """
        moved = rates_g[:, None] > 0
        if whole is None:
            rates = torch.where(moved, rates_g[:, None], 1.0).to(values.dtype)
            whole = self._own_g - self._server_g + (self._start - values) / rates
        return torch.where(moved, whole, self._own_g)
