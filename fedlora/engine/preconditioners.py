"""Preconditioners of a pack's gradients: LoRA-Pro, and LoRA-FA's form of it, and ALLoRA.

They take the gradients that the optimizer would take, clipped, or under DP clipped and noised, and the current A and B
of each layer: post-processing, which costs no privacy. A layer adds s B A to its weight (:class:`ScaledPair`).

**LoRA-Pro** (Wang, Liang, He, Wang & Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025, arXiv
2407.18242; code mrflogs/LoRA-Pro). Steps U of A and V of B move the weight by s (B U + V A). LoRA-Pro takes those that
come nearest to the gradient G of the whole weight, of which those of A and B say enough, g_A = s B^T G and
g_B = s G A^T. Here with damping, as the minimiser of

    |s (B U + V A) - G|^2 + s^2 delta (|U|^2 + |V|^2),    delta = damping |A|^2 / r.

With P = B^T B and Q = A A^T, and g_A A^T = B^T g_B, that is

    U = (P + delta)^-1 g_A / s^2 + Y A,    V = (g_B / s^2 - B U A^T) (Q + delta)^-1,
    (P + delta / 2) Y + Y (Q + delta / 2) = -(P + delta)^-1 g_A A^T / s^2.

For delta -> 0 these are the paper's, with its X, that of a Sylvester equation. Where A is fixed U is 0, and
V = g_B (Q + delta)^-1 / s^2, as in PEFT's LoRA-FA optimizer; where B is, U = (P + delta)^-1 g_A / s^2. What differs:

- The authors add delta = 1e-8 to each matrix that is inverted. While B is small that lets U grow as 1 / |B|, and noise
  of DP in it as 1 / |B|^2. With delta by the size of A no part of g_A is multiplied by more than about 1 / damping
  times what g_B is. At B = 0 there is no g_A and A does not move, as in the authors' first step; noise moves it.
- Adam's moments are of U and V, as in the authors' code in its mode "efficient"; those of the paper's are of a gradient
  as large as the weight, which is never formed here.
- Under DP noise g_A A^T and B^T g_B differ. Only the former is read, so that what would move A against B, and leave
  B A where it is, is left out.
- A head, and what else is trained, has its plain gradient.

The Sylvester equation is solved by Smith's method with squaring (Smith, SIAM J. Appl. Math. 16, 1968), r x r products
in a number that damping and r bound beforehand: solvers by eigenvalues wait for the device, to see whether they failed.
Nothing here does, and all of it can be captured in a CUDA graph.

**ALLoRA** (Huang & Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024, arXiv 2410.09692)
divides the gradient of each row of B by sqrt(|row| + 1 / eta^2). The paper's abstract alone was at hand, which has "a
coefficient inversely proportional to parameters' l2 norm"; the formula and eta = 2 are those of an optimizer of others
that refers to it, and so our choice. The paper has no scale: set ``method.alpha`` to ``method.rank``. AdamW divides a
gradient by its own size, and so undoes most of it; SGD does not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from fedlora.config import ConfigError, TrainConfig
from fedlora.engine.stack import Stack
from fedlora.methods import ScaledPair
from fedlora.transfer import Places


class Preconditioner(ABC):
    """Changes the gradients of layers' A and B before the optimizer's step.

    Args:
        stack: The pack's tensors.
        products: The layers' updates.
        fixed: Returns, for some groups, the tensors that are not trained.
    """

    def __init__(
        self, stack: Stack, products: Sequence[ScaledPair], fixed: Callable[[Places], Mapping[str, Tensor]]
    ) -> None:
        self.stack = stack
        self.products = [one for one in products if {one.a, one.b} & stack.shapes.keys()]
        self.fixed = fixed

    @abstractmethod
    def __call__(self, grads: Tensor, groups: Places) -> None:
        """Change gradients, in place.

        Args:
            grads: The gradients of some groups, [a, P].
            groups: Their places.
        """


@final
class Allora(Preconditioner):
    """Divides rows of B's gradients by the root of their norms.

    Args:
        eta: What a row at zero is multiplied with.
    """

    def __init__(
        self,
        stack: Stack,
        products: Sequence[ScaledPair],
        fixed: Callable[[Places], Mapping[str, Tensor]],
        eta: float,
    ) -> None:
        super().__init__(stack, products, fixed)
        self.eta = eta

    def __call__(self, grads: Tensor, groups: Places) -> None:
        """See :class:`Preconditioner`."""
        values, own = self.stack.named(self.stack.values[groups]), self.stack.named(grads)
        for product in self.products:
            if product.b in own:
                norm = torch.linalg.vector_norm(values[product.b], dim=-1, keepdim=True)
                own[product.b].div_((norm + self.eta**-2).sqrt())


@final
class LoraPro(Preconditioner):
    """Makes steps of A and B whose product moves like the whole weight.

    Args:
        damping: What is added to A A^T and B^T B, by the mean square of A's rows.
    """

    def __init__(
        self,
        stack: Stack,
        products: Sequence[ScaledPair],
        fixed: Callable[[Places], Mapping[str, Tensor]],
        damping: float,
    ) -> None:
        super().__init__(stack, products, fixed)
        self.damping = damping
        self.sides = "".join(side for side in "ab" if any(getattr(one, side) in stack.shapes for one in self.products))
        trained = {name for one in self.products for name, side in ((one.a, "a"), (one.b, "b")) if side in self.sides}
        assert trained <= stack.shapes.keys(), "of some layers A is trained, and not of others"

    def __call__(self, grads: Tensor, groups: Places) -> None:
        """See :class:`Preconditioner`; the matrices of all layers and groups, [n, a, r, r], are inverted at once."""
        if not self.products:
            return
        values = {**self.fixed(groups), **self.stack.named(self.stack.values[groups])}
        own, pairs = self.stack.named(grads), self._pairs(values, groups)
        gram_a = torch.stack([(a @ a.mT).expand(len(grads), -1, -1) for a, _, _ in pairs])
        gram_b = torch.stack([(b.mT @ b).expand(len(grads), -1, -1) for _, b, _ in pairs])
        ranks = torch.stack([rank.expand(len(grads)) for _, _, rank in pairs])
        size = (gram_a.diagonal(dim1=-2, dim2=-1).sum(-1) / ranks)[..., None, None]
        size = size.clamp(min=torch.finfo(size.dtype).tiny ** 0.5)  # of an A that is zero
        eye = torch.eye(gram_a.shape[-1], dtype=grads.dtype, device=grads.device)
        inverse_a, inverse_b = (inverse(gram + self.damping * size * eye) for gram in (gram_a, gram_b))
        squares = [one.scale**2 for one in self.products]
        steps: list[Tensor] = []
        if "a" in self.sides:
            steps = [left @ own[one.a] / s2 for one, left, s2 in zip(self.products, inverse_b, squares, strict=True)]
        if self.sides == "ab":
            rhs = torch.stack([-step @ a.mT for step, (a, _, _) in zip(steps, pairs, strict=True)]) / size
            half = self.damping / 2 * eye
            y_n = sylvester(gram_b / size + half, gram_a / size + half, rhs, doublings(self.damping, len(eye)))
            steps = [step + y @ a for step, y, (a, _, _) in zip(steps, y_n, pairs, strict=True)]
        for one, step in zip(self.products, steps, strict=False):
            own[one.a].copy_(step)
        if "b" in self.sides:
            for n, (one, s2, (a, b, _)) in enumerate(zip(self.products, squares, pairs, strict=True)):
                rest = own[one.b] / s2 - b @ (steps[n] @ a.mT) if steps else own[one.b] / s2
                own[one.b].copy_(rest @ inverse_a[n])

    def _pairs(self, values: Mapping[str, Tensor], groups: Places) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return A and B of each layer, [a, r, d_in] and [a, d_out, r] or without a, and the groups' ranks, [a] or [].

        A factor that is fixed is of the full rank for all groups: what is beyond a group's own ranks is set to zero, as
        it is in a factor that is trained.
        """
        if self.stack.real is None:
            rank = torch.full((), values[self.products[0].a].shape[-2], device=self.stack.values.device)
            return [(values[one.a], values[one.b], rank) for one in self.products]
        real, found = self.stack.named(self.stack.real[groups]), []
        for one in self.products:
            own = real[one.a][:, :, 0] if one.a in real else real[one.b][:, 0]  # [a, r]
            found.append((values[one.a] * own[:, :, None], values[one.b] * own[:, None], own.sum(1)))
        return found


def inverse(matrices: Tensor) -> Tensor:
    """Return the inverses of positive definite matrices, [*, r, r], without waiting for the device.

    By Cholesky factors that nothing checks, and triangular solves: torch's own inverses do not wait, either, up to a
    rank of 16; above that, and in ``cholesky_inverse``, a CUDA graph cannot hold them.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    lower: Tensor = torch.linalg.cholesky_ex(matrices).L
    inverse_of_lower: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse_of_lower.mT @ inverse_of_lower


def doublings(damping: float, rank: int) -> int:
    """Return how often :func:`sylvester` has to square, until what is left out is below rounding in float64.

    With a trace of q - damping / 2 of at most r and nothing of it below damping / 2 each term is at most
    exp(-min(damping, 2 / (r + 1))) times the one before, and after n squarings 2^n of them are there.
    """
    return math.ceil(math.log2(40 / min(damping, 2 / (rank + 1))))


def sylvester(p: Tensor, q: Tensor, rhs: Tensor, doublings: int) -> Tensor:
    """Return Y with ``p Y + Y q = rhs`` of positive definite p and q, [*, r, r], of the size of one.

    (p + 1) Y (q + 1) - (p - 1) Y (q - 1) = 2 rhs, so Y is a sum of L^k W R^k, with L = (p - 1) / (p + 1), R that of q,
    and W = 2 (p + 1)^-1 rhs (q + 1)^-1.

    Args:
        p: Any such matrix.
        q: One that :func:`doublings` is for.
        rhs: The right-hand side.
        doublings: Squarings of L and R; as many times the number of terms is doubled.
    """
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    left, right = inverse(p + eye), inverse(q + eye)
    y = 2 * left @ rhs @ right
    left, right = eye - 2 * left, eye - 2 * right
    for _ in range(doublings):
        y = y + left @ y @ right
        left, right = left @ left, right @ right
    return y


def build_preconditioner(
    config: TrainConfig,
    stack: Stack,
    products: Sequence[ScaledPair],
    fixed: Callable[[Places], Mapping[str, Tensor]],
) -> Preconditioner | None:
    """Return what ``train.gradient`` names; None: nothing.

    Raises:
        ConfigError: The method has no such products.
    """
    if config.gradient == "plain":
        return None
    if not products:
        raise ConfigError(f"train.gradient = {config.gradient!r}: the method's layers are no products of two tensors.")
    if config.gradient == "allora":
        return Allora(stack, products, fixed, config.eta)
    return LoraPro(stack, products, fixed, config.damping)
