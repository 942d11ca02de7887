"""A model's repeated blocks: what is compiled, and what is computed twice where memory is short."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedlora.engine.core import Engine


def block_lists(engine: Engine) -> list[list[nn.Module]]:
    """Return the modules that a model repeats: the outermost lists of modules of one kind that hold adapted layers."""
    names = [layer.name for layer in engine.base.structure.adapted]
    found: list[list[nn.Module]] = []
    within: list[str] = []
    for name, module in engine.base.model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in within):
            continue
        if len({type(block) for block in module}) == 1 and any(layer.startswith(f"{name}.") for layer in names):
            within.append(name)
            found.append(list(module))
    return found


def blocks_of(engine: Engine) -> list[nn.Module]:
    """Return the blocks of all such lists."""
    return [block for blocks in block_lists(engine) for block in blocks]


def checkpoint_blocks(engine: Engine) -> bool:
    """Have the backward pass compute what a block holds for it anew, from now on; return whether that is anything new.

    The factors are in place then, since the backward pass runs while they are. transformers' own switch for it is
    silently off in a model that is not in training mode.
    """
    grouped = engine.grouped
    blocks = [] if grouped.checkpointed else blocks_of(engine)
    if not blocks:
        return False
    grouped.checkpointed = True
    grouped.blocks = {
        block: partial(checkpoint, grouped.blocks.get(block, block.forward), use_reentrant=False) for block in blocks
    }
    return True
