"""The DP-SGD step of a pack: per-example gradient clipping, and Gaussian noise on each client's sum.

Pure functions on matrices of flat gradients, with Opacus's ``DPOptimizer`` as oracle in the tests. Not a subclass of
it: that one works on parameters with a ``grad_sample`` and one clip, one noise and one step for all of them, where a
pack needs them by client; overriding all of these would leave nothing of it.

`N` rows, `G` clients of a pack, `P` trained numbers of a client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.randomness import PrivateRandom


@final
@dataclass(frozen=True)
class PrivateStep:
    """What a pack needs to take its steps under DP.

    Attributes:
        mechanism: The numbers, the same for all clients.
        randoms: Each client's own source of noise, [G].
    """

    mechanism: Mechanism
    randoms: Sequence[PrivateRandom]


def clip_rows(grads: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """Scale each row's gradient to a norm of at most ``max_grad_norm``; one that is not finite becomes zero.

    A row whose gradient is not finite must not reach the sum: it would make all of it NaN, noise included, and so
    reveal that it is there.

    Args:
        grads: Gradients of the rows, all trained numbers together, [N, P].
        max_grad_norm: The bound.

    Returns:
        The clipped gradients [N, P], and the norms before [N].
    """
    norms = grads.square().sum(1).sqrt()
    factor = torch.clamp(max_grad_norm / (norms + 1e-6), max=1.0)  # the constant is Opacus's
    clipped = grads * factor[:, None]
    finite = torch.isfinite(norms)
    return torch.where(finite[:, None], clipped, 0.0), norms


def noisy_mean(sums: Tensor, step: PrivateStep, real: Tensor | None = None) -> Tensor:
    """Return each client's gradient as the optimizer may see it: noise on the sum, by the *expected* batch size.

    Args:
        sums: Sums of clipped gradients, [G, P]; zero for a client of whose rows none was sampled.
        step: Mechanism and sources of noise.
        real: Which numbers are a client's own, bool [G, P]; None: all. Noise is drawn for these alone, so that it does
            not depend on the ranks of the other clients of the pack.
    """
    mechanism = step.mechanism
    if real is None:
        noise = torch.stack([random.normal(row) for random, row in zip(step.randoms, sums, strict=True)])
    else:
        noise = torch.zeros_like(sums)
        for g, random in enumerate(step.randoms):
            noise[g, real[g]] = random.normal(sums[g, real[g]])
    deviation = mechanism.noise_multiplier * mechanism.max_grad_norm
    return (sums + deviation * noise) / mechanism.expected_batch_size


@final
class PrivateSum:
    """The gradients of a pack under DP: clipped rows are summed into them, then noise comes on top.

    Diagnostics for the site are counted beside. The guarantee does not cover them; they must not leave the client.

    Args:
        sums: Where the sums go, [G, P]; zero at the start of each step.
        step: Mechanism and sources of noise.
        real: Which numbers are a client's own and not padding, bool [G, P]; None: all.
    """

    def __init__(self, sums: Tensor, step: PrivateStep, real: Tensor | None = None) -> None:
        self._sums = sums
        self._step = step
        self._real = real
        zero_g = torch.zeros(len(sums), dtype=torch.float64, device=sums.device)
        self._rows_g, self._clipped_g, self._dropped_g, self._empty_g, self._signal_g, self._before_g = (
            zero_g.clone() for _ in range(6)
        )

    def add(self, owner_n: Tensor, grads: Tensor) -> None:
        """Clip rows' gradients [N, P] and add each to its client's sum; ``owner_n`` [N] says whose it is."""
        max_grad_norm = self._step.mechanism.max_grad_norm
        if self._real is not None:
            grads = torch.where(self._real[owner_n], grads, 0.0)
        clipped, norms = clip_rows(grads, max_grad_norm)
        self._sums.index_add_(0, owner_n, clipped)
        self._rows_g.index_add_(0, owner_n, torch.ones_like(norms, dtype=torch.float64))
        self._clipped_g.index_add_(0, owner_n, (norms > max_grad_norm).double())
        self._dropped_g.index_add_(0, owner_n, (~torch.isfinite(norms)).double())

    def release(self) -> None:
        """Turn the sums into what the optimizer may see; also where no row was sampled, which must not show."""
        self._signal_g += self._sums.square().sum(1).sqrt().double()
        self._empty_g += self._rows_g == self._before_g
        self._before_g = self._rows_g.clone()
        self._sums.copy_(noisy_mean(self._sums, self._step, self._real))

    def diagnostics(self, group: int, steps: int) -> dict[str, float]:
        """Return a client's numbers of the round."""
        rows, mechanism = float(self._rows_g[group]), self._step.mechanism
        numbers = self._sums.shape[1] if self._real is None else int(self._real[group].sum())
        noise = mechanism.noise_multiplier * mechanism.max_grad_norm * math.sqrt(numbers)
        return {
            "rows": rows,
            "empty_steps": float(self._empty_g[group]),
            "clipped_fraction": float(self._clipped_g[group]) / max(1.0, rows),
            "dropped_rows": float(self._dropped_g[group]),
            "signal_to_noise": float(self._signal_g[group]) / max(1, steps) / noise if noise else math.inf,
        }
