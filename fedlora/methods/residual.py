"""A residual: a second low-rank term of each LoRA layer, ``y += scale * B_res A_res x``, broadcast and not trained.

What a paper merges into the frozen base (FLoRA: all rounds' updates, stacked; FedEx-LoRA: what means of A and B leave
out) lives here instead, so the base stays untouched. Its rank R grows by round, in each layer by as much as is added
there, up to the layer's features. What a client alone merges
(Fed-PLoRA: the ranks that it does not train) is a residual of its own, which it makes of the adapter that it is sent
(:func:`folded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.base import TensorSpec
from fedlora.methods.products import Array, decompose, pairs

KIND = "residual"


def residual_specs(specs: Mapping[str, TensorSpec], ranks: Sequence[int]) -> dict[str, TensorSpec]:
    """Return ``<layer>.residual_A`` [R, d_in] and ``<layer>.residual_B`` [d_out, R] of layers with an A and a B.

    Args:
        specs: The method's tensors.
        ranks: The ranks that have been stacked so far, of each layer; R is this, or the layer's features where they are
            fewer. Layers without any, or all where it is empty, have no residual.
    """
    residual: dict[str, TensorSpec] = {}
    stacked = zip(pairs(specs), ranks, strict=True) if ranks else ()
    for (layer, a, b), rank in ((pair, rank) for pair, rank in stacked if rank):
        d_in, d_out = specs[a].shape[1], specs[b].shape[0]
        held = min(rank, d_in, d_out)
        residual[f"{layer}.residual_A"] = TensorSpec((held, d_in), KIND, (), 0.0)
        residual[f"{layer}.residual_B"] = TensorSpec((d_out, held), KIND, (), 0.0)
    return residual


def folded(specs: Mapping[str, TensorSpec], tensors: Mapping[str, Array], trained: Sequence[int]) -> dict[str, Array]:
    """Return as a residual what a layer's ranks but some come to, by name.

    Args:
        specs: The method's tensors.
        tensors: The whole of each A and B.
        trained: Places of the ranks that are left out.
    """
    found: dict[str, Array] = {}
    for layer, a, b in pairs(specs):
        found[f"{layer}.residual_A"] = np.delete(tensors[a], trained, 0)
        found[f"{layer}.residual_B"] = np.delete(tensors[b], trained, 1)
    return found


# Singular values below this share of the largest are rounding: of factors as they are stored, of the SVD, and of any
# product with them. Stored factors make noise of about epsilon (2e-16, 6e-8), products of some hundred numbers ten
# times that; this is above both, and leaving it out is not to be seen in an output.
_ROUNDING = {"float64": 1e-12, "float32": 1e-6}


def compress(a: Array, b: Array, rank: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A [rank, d_in] and B [d_out, rank] of the product b a, cut to its largest singular values.

    Without loss where ``rank`` is at least the rank of the product. Each factor takes the root of the singular values.

    Args:
        a: [R, d_in].
        b: [d_out, R].
        rank: Singular values to keep; None: those that are not rounding, at least one and at most as many as d_in or
            d_out.
    """
    cut = _ROUNDING.get(str(np.result_type(a, b)), 1e-6)
    u, s, vt = decompose(a, b)
    if rank is None:
        rank = max(1, int((s > cut * s[0]).sum()))
    root = np.sqrt(s[:rank])
    return root[:, None] * vt[:rank], u[:, :rank] * root


def extend(held: Mapping[str, Array], layer: str, a: Array, b: Array) -> dict[str, NDArray[np.float64]]:
    """Return a layer's residual with a product b a added to it, by name.

    Its factors stand behind those that are held, until there are more ranks than the layer has features: from then on
    the smaller side's factor is the identity, and the other one the whole product.

    Args:
        held: What the server holds, with or without the layer's residual.
        layer: The layer.
        a: [R, d_in].
        b: [d_out, R].
    """
    into_a, into_b = f"{layer}.residual_A", f"{layer}.residual_B"
    if into_a in held:
        a = np.concatenate([held[into_a].astype(np.float64), a], axis=0)
        b = np.concatenate([held[into_b].astype(np.float64), b], axis=1)
    (d_out, ranks), d_in = b.shape, a.shape[1]
    if ranks > min(d_in, d_out):  # a product of that rank has no smaller factors: no SVD is needed to find them
        whole = b.astype(np.float64) @ a.astype(np.float64)
        a, b = (np.eye(d_in), whole) if d_in <= d_out else (whole, np.eye(d_out))
    return {into_a: a.astype(np.float64), into_b: b.astype(np.float64)}
