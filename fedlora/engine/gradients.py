"""Gradients of whole weights, layer by layer.

Of a frozen weight W [d_out, d_in] the gradient is the sum over tokens of g x^T, with the layer's inputs x and the
gradients g of its outputs. The weight itself is never read, so any kind of base layer works, and there is one matrix
of d_out x d_in numbers at a time, at the price of a pass over the rows for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.engine.core import Engine, GroupTensors
from fedlora.engine.work import Arrays
from fedlora.tasks import Rows


def weight_gradients(engine: Engine, initial: Arrays, rows: Rows) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted layer's name with the mean gradient of rows' losses with respect to its weight, [d_out, d_in].

    Args:
        engine: The engine.
        initial: The tensors at which it is taken.
        rows: The rows, one or more.
    """
    group = np.zeros(len(rows), dtype=np.int64)
    tensors, passes = GroupTensors(engine, initial, [{}]), engine.passes(rows.cost, group, padded=True)
    for layer in engine.base.structure.adapted:
        total = torch.zeros(layer.d_out, layer.d_in, dtype=engine.dtype, device=engine.device)

        def observe(_: Any, inputs: tuple[Tensor, ...], output: Tensor, total: Tensor = total) -> Tensor:
            x = inputs[0].detach()

            def add(grad: Tensor) -> None:
                g, flat = (value.flatten(0, -2).to(total) for value in (grad, x))
                total.addmm_(g.T, flat)

            output = output.detach().requires_grad_()  # what comes before the layer needs no gradient
            output.register_hook(add)  # type: ignore[no-untyped-call]
            return output

        base: Any = engine.base.model.get_submodule(layer.name)
        handle = base.base.register_forward_hook(observe)
        try:
            for chosen in passes:
                batch = engine.task.collate(rows, chosen.tolist(), engine.device)
                with tensors.placed(group[chosen]) as model:
                    (engine.task.row_losses(model, batch).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
        finally:
            handle.remove()
        yield layer.name, total
