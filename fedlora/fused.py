"""Functions of elementwise steps that a GPU computes in one pass over their numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, final

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes the same: on a GPU compiled, once in a process, and on a CPU as it is.

    Args:
        function: A function of a module, so that what is compiled is kept; one of its arguments is a tensor.
    """

    def run(*args: Any) -> Any:
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in args)
        return (_compiled(function) if on_gpu else function)(*args)

    return run


@final
class WithFallback:
    """A function for GPUs, and the same in plain torch for machines that cannot compile (without a C compiler, say).

    Args:
        fast: The first; it fails before it changes anything.
        plain: The second.
    """

    def __init__(self, fast: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self._fast = fast
        self._plain = plain

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns; where the first fails, the second takes its place from then on."""
        chosen = self._fast
        try:
            return chosen(*args)
        except (torch.OutOfMemoryError, AssertionError):
            raise
        except Exception as error:
            if chosen is self._plain:
                raise
            _logger.warning(
                "%s: plain torch computes from now on, the fast way failed (%s)", self._plain.__name__, error
            )
            self._fast = self._plain
            return self._plain(*args)


@cache
def _compiled(function: Callable[..., Any]) -> WithFallback:
    return WithFallback(torch.compile(function, dynamic=True), function)
