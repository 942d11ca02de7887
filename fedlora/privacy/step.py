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
from typing import Protocol, final

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


class RowGradients(Protocol):
    """A part of the gradients of single rows, of some of the trained numbers."""

    def squares(self) -> Tensor:
        """Return each row's sum of squares, in float32 or wider, [N]."""

    def add(self, sums: Tensor, factor_n: Tensor) -> None:
        """Add each row times its factor to its client's sum [a, P], in place; a factor of 0 drops NaN, too."""


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """Return what scales rows' gradients of these norms to at most ``max_grad_norm``, [N]; 0 for what is not finite.

    A row whose gradient is not finite must not reach the sum: it would make all of it NaN, noise included, and so
    reveal that it is there.
    """
    factor = torch.clamp(max_grad_norm / (norms + 1e-6), max=1.0)  # the constant is Opacus's
    return torch.where(torch.isfinite(norms), factor, 0.0)


def noisy_mean(sums: Tensor, step: PrivateStep, groups: Sequence[int], real: Tensor | None = None) -> Tensor:
    """Return clients' gradients as the optimizer may see them: noise on the sum, by the *expected* batch size.

    Args:
        sums: Sums of clipped gradients, [a, P]; zero for a client of whose rows none was sampled.
        step: Mechanism and sources of noise.
        groups: The places of these clients among the sources, [a].
        real: Which numbers are a client's own, bool [a, P]; None: all. Noise is drawn for these alone, so that it does
            not depend on the ranks of the other clients of the pack.
    """
    mechanism = step.mechanism
    noise = torch.zeros_like(sums)
    for at, group in enumerate(groups):
        if real is None:
            noise[at] = step.randoms[group].normal(sums[at])
        else:
            noise[at, real[at]] = step.randoms[group].normal(sums[at, real[at]])
    deviation = mechanism.noise_multiplier * mechanism.max_grad_norm
    return (sums + deviation * noise) / mechanism.expected_batch_size


@final
class PrivateSum:
    """The gradients of a pack under DP: clipped rows are summed, then noise comes on top.

    Diagnostics for the site are counted beside. The guarantee does not cover them; they must not leave the client.

    Args:
        step: Mechanism and sources of noise.
        values: The trained numbers of the pack, [G, P].
        real: Which of them are a client's own and not padding, bool [G, P]; None: all.
    """

    def __init__(self, step: PrivateStep, values: Tensor, real: Tensor | None = None) -> None:
        self._step = step
        self._real = real
        self._numbers = values.shape[1]
        # Of each client: rows, those clipped, those dropped, steps without rows, and the sums' norms before noise.
        self._counts = torch.zeros((5, len(values)), dtype=torch.float64, device=values.device)
        self._turn = self._counts

    def begin(self, clients: int) -> None:
        """Begin a turn of so many clients; what was added before and not released is forgotten."""
        self._turn = self._counts.new_zeros((3, clients))

    def add(self, sums: Tensor, parts: Sequence[RowGradients], slot_n: Tensor) -> None:
        """Clip rows' gradients, and add each to its client's sum.

        Args:
            sums: The sums of the turn's clients, [a, P], in place.
            parts: The gradients of the rows; all parts together are clipped to one norm.
            slot_n: For each row its client's place in ``sums``, [N].
        """
        if not parts:
            return
        max_grad_norm = self._step.mechanism.max_grad_norm
        squares = torch.stack([part.squares() for part in parts]).sum(0)
        norms = squares.sqrt()
        factor_n = clip_factors(norms, max_grad_norm)
        for part in parts:
            part.add(sums, factor_n)
        counted = (torch.ones_like(norms), norms > max_grad_norm, ~norms.isfinite())
        self._turn.index_add_(1, slot_n, torch.stack([flag.double() for flag in counted]))

    def release(self, sums: Tensor, groups: Sequence[int], places: slice | Tensor) -> Tensor:
        """Return the sums of a turn's clients as the optimizer may see them; also where no row was sampled.

        That must not show.

        Args:
            sums: The sums, [a, P].
            groups: The clients' places in the pack, [a].
            places: The same, to index tensors with.
        """
        signal_a = torch.linalg.vector_norm(sums, dim=1).double()
        empty_a = (self._turn[0] == 0).double()
        self._counts[:, places] += torch.stack([*self._turn, empty_a, signal_a])
        return noisy_mean(sums, self._step, groups, None if self._real is None else self._real[places])

    def diagnostics(self, steps: Sequence[int]) -> list[dict[str, float]]:
        """Return each client's numbers of the round, in which it took so many steps."""
        mechanism, found = self._step.mechanism, []
        numbers = [self._numbers] * len(steps) if self._real is None else self._real.sum(1).tolist()
        for counts, taken, own in zip(self._counts.T.tolist(), steps, numbers, strict=True):
            rows, clipped, dropped, empty, signal = counts
            noise = mechanism.noise_multiplier * mechanism.max_grad_norm * math.sqrt(own)
            found.append(
                {
                    "rows": rows,
                    "empty_steps": empty,
                    "clipped_fraction": clipped / max(1.0, rows),
                    "dropped_rows": dropped,
                    "signal_to_noise": signal / max(1, taken) / noise if noise else math.inf,
                }
            )
        return found
