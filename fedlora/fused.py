"""Functions of elementwise steps that a GPU computes in one pass over their numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes the same: on a GPU compiled, once in a process, and on a CPU as it is.

    Args:
        function: A function of a module, so that what is compiled is kept; one of its arguments is a tensor.
    """

    def run(*args: Any, **settings: Any) -> Any:
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in args)
        return (_compiled(function) if on_gpu else function)(*args, **settings)

    return run


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
