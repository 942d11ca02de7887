"""Factors that start as the base model has them (``method.init``): singular triples of weights, or of their gradients.

One machine computes them and sends them, since others round differently. A large matrix is not decomposed whole: the
triples that are wanted come from the projection on a random subspace, after some power iterations (Halko, Martinsson &
Tropp 2011, arXiv 0909.4061, algorithm 4.4, as in ``torch.svd_lowrank``), drawn from a seed that is always the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import Config, ConfigError
from fedlora.engine.core import Engine
from fedlora.engine.decomposed import weight_of
from fedlora.engine.gradients import weight_gradients
from fedlora.engine.work import Arrays
from fedlora.methods.lora import Lora
from fedlora.methods.lora_started import STARTS
from fedlora.methods.products import Decomposed, oriented
from fedlora.tasks import Rows

# Singular values below this share of the largest are rounding of the weights, or of the sum over tokens, which is not
# in 16 bits.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
_WHOLE = 1024  # features up to which the whole decomposition takes less than a second
_ITERATIONS = 4
_GAMMA = 16.0  # of LoRA-GA's stable scale, the paper's


def computed_start(
    engine: Engine, config: Config, initial: Arrays, public: Rows | None
) -> dict[str, NDArray[np.floating]]:
    """Return the tensors that the server computes and sends (``TensorSpec.computed``); none where the seed gives all.

    Args:
        engine: The engine.
        config: The run's configuration.
        initial: The tensors that the run starts with otherwise.
        public: The rows of ``data.public-path``, where a gradient is asked for.

    Raises:
        ConfigError: The rows give a gradient of too small a rank, or the weights cannot be read or have one.
    """
    method, found = config.method, dict[str, NDArray[np.floating]]()
    if not method.computed:
        return found
    if method.reads_public_rows:
        assert public is not None, "rows that the configuration names"
        matrices = weight_gradients(engine, initial, public)
        what, cure = f"the {len(public)} rows of data.public-path give {{}} a gradient", "name more rows, "
    else:
        matrices, what, cure = _weights(engine), "{} has a weight", ""
    names: dict[str, dict[str, str]] = {}
    for name, spec in engine.method.specs().items():
        if spec.computed:
            names.setdefault(name.rpartition(".")[0], {})[spec.kind[0]] = name
    rank, vectors = method.rank, method.rank * STARTS.get(method.init, 1)
    for layer, matrix in matrices:
        triples = leading(matrix, vectors)
        s = triples.s
        held = int((s > _ROUNDING[engine.dtype] * s[0]).sum()) if np.isfinite(s).all() else 0
        if held < vectors:
            double = "twice " if vectors > rank else ""
            raise ConfigError(
                f"method.init = {method.init!r}: {what.format(layer)} of rank {held}, below {double}method.rank = "
                f"{rank}; {cure}lower method.rank, or set 'orthonormal'."
            )
        a, b = _factors(triples, config)
        own = names[layer]
        found |= {own["A"]: a.astype(initial[own["A"]].dtype), own["B"]: b.astype(initial[own["B"]].dtype)}
    return found


def _factors(triples: Decomposed, config: Config) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A [r, d_in] and B [d_out, r] of the leading singular triples."""
    (u, s, vt), method, rank = triples, config.method, config.method.rank
    match method.init:
        case "pissa":
            root = np.sqrt(s / Lora((), rank=rank, alpha=method.alpha, rslora=method.rslora).scale)
            return root[:, None] * vt, u * root
        case "lora-ga":
            stable = len(u) ** 0.25 / _GAMMA**0.5
            return stable * vt[:rank], stable * u[:, rank:]
    return vt, u


def leading(matrix: Tensor, count: int) -> Decomposed:
    """Return the ``count`` largest singular triples of a matrix; the largest entry of each right vector is positive."""
    matrix = matrix.double()
    if min(matrix.shape) <= max(_WHOLE, 4 * count):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        numbers = torch.Generator().manual_seed(0)  # of the CPU, so that every device has the same
        drawn = torch.randn(matrix.shape[1], 2 * count, generator=numbers, dtype=torch.float64)
        basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        u, s, vt = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        u = basis @ u
    return oriented(*(value.cpu().numpy() for value in (u[:, :count], s[:count], vt[:count])))


def _weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted layer's name with its weight, [d_out, d_in]; of a quantised one what it computes with."""
    for layer in engine.base.structure.adapted:
        base = engine.base.model.get_submodule(layer.name).base
        try:
            weight = weight_of(base)  # type: ignore[arg-type]
        except Exception as error:  # whatever a library for quantised layers raises
            raise ConfigError(
                f"method.init = 'pissa': the weight of {layer.name} ({type(base).__name__}) cannot be read; set "
                "'orthonormal', or choose a base that is quantised otherwise or not at all."
            ) from error
        yield layer.name, weight
