"""LoRA-FAIR: A and B are averaged apart, and the server corrects B so that the product comes near the mean product.

Bian, Wang, Zhang & Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV
2025, arXiv 2411.14961. Known from its abstract and notes; the authors' code was not at hand.

With the means A and B (as in ``fedavg``) and D = sum_k p_k B_k A_k, clients are sent A and B + C, where C minimises one
of two things (``lora-fair.objective``):

- ``cosine``, the paper's: 1 - cos(D, (B + C) A) + weight |C|, with weight = 0.01 in the paper. How it is minimised is
  our choice: proximal gradient steps from C = 0 with a line search, where the paper uses SGD;
- ``least-squares``, our closed form: |D - (B + C) A|^2 + weight |C|^2, so C = (D - B A) A^T (A A^T + weight I)^-1. With
  a small weight it is the best that any B can do beside this A.

The same bytes as ``fedavg``. Near to exact is not all: in the paper weight = 0 does worse than no correction (73.22 to
75.75 on DomainNet), because C takes B away from where the clients are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Options, at_least, one_of
from fedlora.methods.products import pairs
from fedlora.reduce import Reduced, mean_product, weighted_mean
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy

Array = NDArray[np.floating]

_STEPS = 200
_SHORTEST = 1e-12  # step of the line search, by the length of B
_TINY = 1e-12


@final
@dataclass(frozen=True)
class LoraFairOptions(Options):
    """LoRA-FAIR; read by ``strategy.name = 'lora-fair'`` only."""

    section: ClassVar[str] = "lora-fair"

    objective: str = "cosine"
    """What the correction of B minimises: ``cosine``, the paper's, or ``least-squares``, in closed form."""
    weight: float = 0.01
    """Weight of the correction's own length in it."""

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("lora-fair.objective", self.objective, ("cosine", "least-squares"))
        at_least("lora-fair.weight", self.weight, 0)


@final
class LoRAFair(Strategy):
    """Averages A and B, and corrects B."""

    name = "lora-fair"
    methods = ("lora",)
    exact = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._options = setting.config.options(LoraFairOptions)

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the means with each layer's B corrected."""
        means = dict(weighted_mean(reduced.updates, self.expected(server_round)))
        correct = least_squares if self._options.objective == "least-squares" else nearest_direction
        for _, a, b in pairs(self.setting.specs):
            means[b] = means[b] + correct(
                *mean_product(reduced.updates, a, b), means[a], means[b], self._options.weight
            )
        return replace(state, tensors={**state.tensors, **means})


def least_squares(of_a: Array, of_b: Array, a: Array, b: Array, weight: float) -> Array:
    """Return the C [d_out, r] that minimises ``|of_b of_a - (b + C) a|^2 + weight |C|^2``.

    Args:
        of_a: [R, d_in], with ``of_b`` [d_out, R] the factors of D.
        of_b: See ``of_a``.
        a: A, [r, d_in].
        b: B, [d_out, r].
        weight: Of the second term.
    """
    gram = a @ a.T
    missing = of_b @ (of_a @ a.T) - b @ gram  # (D - B A) A^T
    # Of least norm where A has fewer ranks than rows and the weight is zero.
    c: Array = missing @ np.linalg.pinv(gram + weight * np.eye(len(gram)), hermitian=True)
    return c


def nearest_direction(of_a: Array, of_b: Array, a: Array, b: Array, weight: float) -> Array:
    """Return the C [d_out, r] that makes ``1 - cos(of_b of_a, (b + C) a) + weight |C|`` small; arguments as above.

    The cosine takes inner products of factors alone, never d_out x d_in numbers. Zero where D or B A is.
    """
    gram, pull = a @ a.T, of_b @ (of_a @ a.T)  # [r, r], D A^T [d_out, r]
    length = float(np.sqrt(max(0.0, np.sum((of_b.T @ of_b) * (of_a @ of_a.T)))))  # |D|

    if not length:
        return np.zeros_like(b)

    def cosine(moved: Array) -> tuple[float, float, float]:
        own = float(np.sqrt(max(0.0, np.sum((moved.T @ moved) * gram))))
        along = float(np.sum(moved * pull))
        return (along / (length * own) if own > _TINY * length else 0.0), own, along

    c = np.zeros_like(b)
    value, own, along = cosine(b)
    if own <= _TINY * length:
        return c
    worth, step = 1 - value, float(np.linalg.norm(b))
    for _ in range(_STEPS):
        gradient = -(pull / own - along / own**3 * (b + c) @ gram) / length
        while step > _SHORTEST * np.linalg.norm(b):
            tried = _shrunk(c - step * gradient, step * weight)
            new = cosine(b + tried)
            if 1 - new[0] + weight * np.linalg.norm(tried) < worth:
                break
            step /= 2
        else:
            break  # nothing nearby is better
        c, (value, own, along) = tried, new
        worth, step = float(1 - value + weight * np.linalg.norm(c)), 2 * step
    return c


def _shrunk(c: Array, by: float) -> Array:
    """Return c, shorter by as much: the proximal step of a length."""
    length = float(np.linalg.norm(c))
    return c * max(0.0, 1 - by / length) if length else c
