"""What a model in 16 bits makes of a rounding, and how strong adapters may be for an error to be told from one.

The same arithmetic in another order gives other numbers. How much a model makes of that is found by rounding: each
block's output is moved by a last place. An adapter whose update is far larger than what its layer puts out, as of a
large ``method.alpha``, makes more of it than an error does, and says nothing until it is weaker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedlora.engine.blocks import blocks_of
from fedlora.engine.core import Engine
from fedlora.engine.work import Arrays

Moved = TypeVar("Moved", bound=ArrayLike)
Found = TypeVar("Found")

ROUNDINGS = 3
"""Numbers of 16 bits may differ by this many times what one rounding of each block's output changes."""
STRENGTHS = (1.0, 1 / 4, 1 / 16)
"""What random tensors are multiplied with in turn, see :func:`weakened`: weaker ones than these do nothing."""


def weakened(engine: Engine, tensors: Arrays, strength: float) -> dict[str, NDArray[np.floating]]:
    """Return adapters that do less: all tensors but the head's times ``strength``."""
    specs = engine.method.specs()
    return {name: value if specs[name].kind == "head" else value * strength for name, value in tensors.items()}


@contextmanager
def rounded_blocks(engine: Engine, seed: int = 0) -> Iterator[None]:
    """Have each block's output moved by up to one unit in the last place, and its gradient likewise."""
    generator = torch.Generator(engine.device).manual_seed(seed)

    def move(_module: Any, _given: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden, Tensor):
            return out  # of a kind of its own: its own rounding is not measured
        by = torch.rand(hidden.shape, generator=generator, device=engine.device) * 2.0 - 1.0
        moved = (hidden.float() * (1.0 + torch.finfo(hidden.dtype).eps * by)).to(hidden.dtype)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    with ExitStack() as stack:
        for block in blocks_of(engine):
            stack.callback(block.register_forward_hook(move).remove)
        yield


def told(
    engine: Engine, measure: Callable[[float], Found], apart: Callable[[Found, Found], Moved], most: float
) -> tuple[float, Found, Moved]:
    """Return the largest strength at which an error is told from a rounding; 1 where it is at none of ``STRENGTHS``.

    Then it is the model that makes so much of a rounding, and weaker adapters would do less for nothing.

    Args:
        engine: The engine, in 16 bits.
        measure: Measures adapters of a strength, see :func:`weakened`.
        apart: How far what was measured with roundings is from what was without.
        most: What counts as an error.

    Returns:
        The strength, what was measured with it, and how far roundings have moved that.
    """
    tries = []
    for strength in STRENGTHS:
        found = measure(strength)
        with rounded_blocks(engine):
            moved = apart(measure(strength), found)
        tries.append((strength, found, moved))
        if ROUNDINGS * np.max(moved) <= most:  # not where one is no number
            return tries[-1]
    return tries[0]
