"""The fast ways of a GPU, each tried against the plain one when a model is loaded, and used where it gives the same.

- A language model's answers alone before its output layer (:mod:`fedlora.tasks.token_losses`), on any device;
- the model's blocks on tokens side by side, without padding (:mod:`fedlora.engine.unpadded`);
- the low-rank update in one pass over a layer's rows (:mod:`fedlora.engine.kernels.low_rank`);
- the model's repeated blocks compiled, with shapes left open, so that other packs and lengths compile nothing anew.

The plain way is the reference: the losses and gradients of rows that are nobody's, with all tensors drawn at random.
A family of models that a fast way does not fit is trained the plain way, and the log says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedlora.engine.blocks import block_lists, blocks_of
from fedlora.engine.core import Batching, Engine, most_cost
from fedlora.engine.kernels import attention, low_rank
from fedlora.engine.layers import for_kernel
from fedlora.engine.trial import Plain, Way, fitting, tried
from fedlora.engine.work import Arrays

_logger = logging.getLogger(__name__)
_SHORT = (torch.bfloat16, torch.float16)
_KERNEL_ERROR = 0.1  # of a row of the low-rank kernel, in 16 bits; measured on an H200: 0.011
_SPECIALISED = 64  # versions of a compiled block: of one row or many, of one client or many, with gradients or without
# An analysis that is of no use to open shapes, and in torch 2.11 stops at some of them.
_OPTIONS: dict[str, Any] = {"triton.coalesce_tiling_analysis": False}


def settle(engine: Engine, tensors: Arrays, *, compiled: bool = True, unpadded: bool = True) -> Engine:
    """Return the engine with the fast ways that give what the plain one does, and passes that fit into the memory.

    Args:
        engine: The engine, on any device.
        tensors: All of the method's tensors, for their shapes.
        compiled: Whether blocks may be compiled, which takes about a minute once on a machine.
        unpadded: Whether blocks may run without padding. Then rows meet along an axis, and what 16 bits show of that is
            coarse: :func:`fedlora.engine.rehearsal.rehearse` has to find it right in float32.
    """
    reset(engine)
    ways: list[Way] = [_with_less_memory] if engine.task.with_less_memory(engine.base.model) else []
    on_gpu = engine.device.type == "cuda" and engine.compute != torch.float64
    if len(engine.cards) > 1:
        ways.clear()
        _logger.info("the base model lies on %d GPUs: the plain way computes", len(engine.cards))
    elif on_gpu:
        ways += [*([without_padding] if unpadded else []), _with_kernel, *([_with_compiled] if compiled else [])]
    if ways:
        plain = Plain.of(engine, tensors)
        for way in ways:
            first = fitting(engine, tensors) if way is _with_compiled else 0
            engine = tried(engine, way, tensors, plain, first=first)
    return replace(engine, max_cost=fitting(engine, tensors)) if on_gpu else engine


def like(engine: Engine, settled: Engine) -> Engine:
    """Return an engine that computes as a settled one: of the same base model, and of the same kind of method and task.

    Args:
        engine: The engine, built like the one that was settled.
        settled: What :func:`settle` made of that.
    """
    less = engine.task.with_less_memory(engine.base.model) if settled.less_memory else None
    return replace(
        engine,
        task=less or engine.task,
        kernels=settled.kernels,
        max_cost=settled.max_cost,
        batching=settled.batching,
        less_memory=less is not None,
    )


def reset(engine: Engine) -> None:
    """Have the base model compute in the plain way."""
    config: Any = engine.base.model.config
    if config._attn_implementation == attention.NAME:
        config._attn_implementation = "sdpa"
    engine.grouped.blocks.clear()
    engine.grouped.checkpointed = False
    engine.grouped.run_unpadded(())


def _with_less_memory(engine: Engine) -> tuple[Engine, Callable[[], None]]:
    task = engine.task.with_less_memory(engine.base.model)
    assert task is not None, "asked before"
    return replace(engine, task=task, less_memory=True, max_cost=most_cost(engine.base, task)), lambda: None


def without_padding(engine: Engine) -> tuple[Engine, Callable[[], None]] | None:
    """Have a model's blocks run on tokens side by side, where there is one list of them; see :data:`Way`."""
    config: Any = engine.base.model.config
    before, grouped, lists = config._attn_implementation, engine.grouped, block_lists(engine)
    known = engine.compute in _SHORT or engine.device.type == "cpu"  # to attention's kernels
    if before != "sdpa" or len(lists) != 1 or not known or engine.batching != Batching():
        return None
    attention.register()
    config._attn_implementation = attention.NAME
    grouped.run_unpadded(lists[0])

    def undo() -> None:
        config._attn_implementation = before
        grouped.run_unpadded(())

    return engine, undo


def _with_kernel(engine: Engine) -> tuple[Engine, Callable[[], None]] | None:
    if engine.compute not in _SHORT:
        return None
    shapes = _low_rank_shapes(engine)
    if any(rank > low_rank.MOST_RANKS for _, _, rank in shapes):
        _logger.info("kernel: the plain way computes, the low-rank kernel has room for rank %d", low_rank.MOST_RANKS)
        return None
    low_rank.register()
    for shape in shapes:
        off = low_rank.error_at_scale(*shape, engine.device, engine.compute)
        if not off <= _KERNEL_ERROR:
            words = (
                "the plain way computes, the low-rank kernel of %d features, %d outputs and rank %d is off by %.2g here"
            )
            _logger.warning("kernel: " + words, *shape, off)
            return None
    return replace(engine, kernels=True), lambda: None


def _low_rank_shapes(engine: Engine) -> list[tuple[int, int, int]]:
    """Return d_in, d_out and r of the factors that the low-rank kernel computes, each combination once."""
    tensors = {name: torch.zeros(spec.shape) for name, spec in engine.method.specs().items()}
    found = [for_kernel(one) for one in engine.method.factors(tensors).values()]
    return sorted({(one.A.shape[-1], one.B.shape[-2], one.A.shape[-2]) for one in found if one is not None})


def set_compile_limits() -> None:
    """Have compiled blocks keep as many versions as there are kinds of passes; it holds in this thread only."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SPECIALISED)
    # A scale is a constant: left open it is a tensor on the CPU in each block, for which C++ is compiled, too.
    torch._dynamo.config.specialize_float = True


def _with_compiled(engine: Engine) -> tuple[Engine, Callable[[], None]]:
    set_compile_limits()
    # What is computed in float32 beside a base of 16 bits (FlyLoRA's choice of ranks) is meant to be.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    grouped = engine.grouped
    grouped.blocks = {
        block: torch.compile(block.forward, dynamic=True, options=_OPTIONS) for block in blocks_of(engine)
    }
    return engine, grouped.blocks.clear
