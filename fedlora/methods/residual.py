"""A residual: a second low-rank term of each LoRA layer, ``y += scale * B_res A_res x``, broadcast and not trained.

What a paper merges into the frozen base (FLoRA: all rounds' updates, stacked) lives here instead, so the base stays
untouched. Its rank R grows by round, up to the layer's features; above that :func:`compress` replaces its factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.base import TensorSpec

KIND = "residual"


def residual_specs(specs: Mapping[str, TensorSpec], rank: int) -> dict[str, TensorSpec]:
    """Return ``<layer>.residual_A`` [R, d_in] and ``<layer>.residual_B`` [d_out, R] for every layer with an A and a B.

    Args:
        specs: The method's tensors.
        rank: The ranks that have been stacked so far; R is this, or the layer's features where they are fewer.
    """
    residual: dict[str, TensorSpec] = {}
    for layer, (name_a, name_b) in _pairs(specs).items() if rank else ():
        d_in, d_out = specs[name_a].shape[1], specs[name_b].shape[0]
        held = min(rank, d_in, d_out)
        residual[f"{layer}.residual_A"] = TensorSpec((held, d_in), KIND, (), 0.0)
        residual[f"{layer}.residual_B"] = TensorSpec((d_out, held), KIND, (), 0.0)
    return residual


def _pairs(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, str]]:
    """Return by layer the names of its A and its B."""
    by_layer: dict[str, dict[str, str]] = {}
    for name, spec in specs.items():
        if spec.kind in ("A", "B"):
            by_layer.setdefault(spec.factors[0], {})[spec.kind] = name
    return {layer: (names["A"], names["B"]) for layer, names in by_layer.items()}


# Singular values below this share of the largest are rounding: of factors as they are stored, of the SVD, and of any
# product with them. Stored factors make noise of about epsilon (2e-16, 6e-8), products of some hundred numbers ten
# times that; this is above both, and leaving it out is not to be seen in an output.
_ROUNDING = {"float64": 1e-12, "float32": 1e-6}


def compress(
    a: NDArray[np.floating], b: NDArray[np.floating], rank: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A [rank, d_in] and B [d_out, rank] of the product b a, cut to its largest singular values.

    Without loss where ``rank`` is at least the rank of the product. The singular vectors come from the core of a QR of
    each factor, never from the d_out x d_in product; each factor takes the root of the singular values.

    Args:
        a: [R, d_in].
        b: [d_out, R].
        rank: Singular values to keep; None: those that are not rounding, at least one and at most as many as d_in or
            d_out.
    """
    cut = _ROUNDING.get(str(np.result_type(a, b)), 1e-6)
    a, b = a.astype(np.float64), b.astype(np.float64)
    q_b, r_b = np.linalg.qr(b)  # [d_out, n], [n, R] with n = min(d_out, R)
    q_a, r_a = np.linalg.qr(a.T)  # [d_in, m], [m, R] with m = min(d_in, R)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)  # b a = Q_b (R_b R_a^T) Q_a^T
    if rank is None:
        rank = max(1, int((s > cut * s[0]).sum()))
    root = np.sqrt(s[:rank])
    return root[:, None] * (vt[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
