"""Kinds of work of a profiled round: which a kernel belongs to, by its name and the operation that launched it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

PRODUCTS = "matrix products of the base"
LOW_RANK = "products of adapters and heads"
ATTENTION = "attention"
ELEMENTWISE = "elementwise and norms"
MOVES = "gathers, scatters, casts"
OPTIMIZER = "optimizer, noise, sums over trained numbers"
COPIES = "copies between host and device, fills"
OTHER = "other"
FAMILIES = (PRODUCTS, LOW_RANK, ATTENTION, ELEMENTWISE, MOVES, OPTIMIZER, COPIES, OTHER)

_SMALL = 64  # a product with a smaller dimension has to do with ranks, classes or the few rows of one client
_NAMES = (  # the first that is found in a kernel's or operation's name
    (COPIES, r"^memcpy|^memset|^aten::(fill_|zero_)$"),
    (ELEMENTWISE, r"^triton_(poi|red|per)_"),  # of torch.compile; such names list all that they fuse
    # The last of each are fedlora's own kernels, which bear the names of their functions.
    (OPTIMIZER, r"adam|sgd|multi_tensor|foreach|optimi[sz]er|distribution|normal_|philox|clip|^_(add|peaks)(_\d+)?$"),
    (ATTENTION, r"flash|fmha|attention|attn|sdpa|^_(forward|backward)(_\d+)?$"),
    (LOW_RANK, r"lora|low_?rank|grouped|per_row|^_(two_products|sums)(_\d+)?$"),
)
_PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|matmul|aten::(add|b|badd)?mm$|aten::(dot|mv)$", re.I)
_MOVE = re.compile(r"copy|cat|index|gather|scatter|embedding|_to_|transpose|permute|arange|where|sort|unique", re.I)
_ELEMENT = re.compile(
    r"elementwise|vectorized|reduce|norm|softmax|gelu|silu|triton|nll|add|mul|sub|div|tanh|sqrt|pow|sum|mean|max|lerp"
    r"|relu|neg|exp|log|abs|sin|cos|clamp|maximum|loss",
    re.I,
)


def family(kernel: str, operation: str, shapes: Sequence[Any], numbers: int) -> str:
    """Return the family of a kernel.

    Args:
        kernel: Its name; on a CPU that of the operation.
        operation: The operation that launched it; empty where that is not known, as in a CUDA graph.
        shapes: The shapes of the operation's inputs.
        numbers: Trained numbers of a client: a matrix that is so wide holds trained numbers, gradients or moments.
    """
    for name, pattern in _NAMES:
        if re.search(pattern, kernel, re.I):
            return name
    sizes = [[int(size) for size in shape] for shape in shapes if isinstance(shape, list | tuple) and shape]
    if _PRODUCT.search(kernel) or _PRODUCT.search(operation):
        matrices = [shape for shape in sizes if len(shape) >= 2]
        return LOW_RANK if any(min(shape[-2:]) < _SMALL for shape in matrices) else PRODUCTS
    if any(shape[-1] == numbers for shape in sizes):
        return OPTIMIZER
    if _MOVE.search(operation) or _MOVE.search(kernel):
        return MOVES
    return ELEMENTWISE if _ELEMENT.search(kernel) or _ELEMENT.search(operation) else OTHER


def busy_us(spans: Sequence[tuple[float, float]]) -> float:
    """Return the microseconds in which at least one of these spans is on."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total
