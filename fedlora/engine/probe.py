"""The probe: which trained tensors a gradient reaches and an optimizer moves, tested on synthetic rows.

Where a client's own rows give a tensor no gradient, that may be the rows' doing or a bug's. The probe decides it in the
run's own code (method, layers, model, task, clip, optimizer), once for an engine and a set of trained tensors, with all
that can make a sound gradient vanish taken out of the way:

- rows are made up, of several lengths; all tensors, fixed ones too, are drawn at random, so that no zero factor hides
  another;
- a layer's factor works on the layer's input, shifted by one and scaled to size one: dead units before it do no harm;
- the gradient that arrives at a layer's output is replaced by a fixed one of norm one, so that in every tensor
  gradients are of ordinary size, and rounding is far below them: only whether one arrives is taken from the model;
- it may arrive in either of two networks: the model as it is, or one where adapted layers give their update in place of
  the base layer's output, small or not: dead units and saturated softmaxes after it are not there.

A factor that is cut off, or multiplied by zero, or whose gradient cancels but for rounding, has none in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.apart import random_tensors
from fedlora.engine.core import Engine, Probed
from fedlora.engine.pack import Pack
from fedlora.engine.watch import Watch, negligible
from fedlora.engine.work import Arrays, ClientWork
from fedlora.privacy import PrivateRandom
from fedlora.privacy.step import PrivateStep

# None: base layers are there. A small gain unsaturates a softmax whose other operand is huge.
_GAINS = (None, 1.0, 2.0**-20)


@final
class Arrival:
    """A layer's output in the probe, with the gradient of norm one where any arrives.

    Args:
        gain: What the update is multiplied with, in place of the base layer's output; None: added to that, as it is.
        least: Gradients of no more than this do not count as arriving.
    """

    def __init__(self, gain: float | None, least: float) -> None:
        self.gain = gain
        self.least = least

    def output(self, x: Tensor, own: Callable[[Tensor], Tensor], fixed: Callable[[Tensor], Tensor] | None) -> Tensor:
        """See :class:`fedlora.engine.layers.LayerProbe`."""
        shifted = x + 1.0
        update = own(shifted / shifted.detach().square().mean().sqrt())
        if self.gain is not None:
            update = update * self.gain
        elif fixed is not None:
            update = fixed(x) + update
        if update.requires_grad:
            update.register_hook(self._unit)  # type: ignore[no-untyped-call]
        return update

    def _unit(self, grad: Tensor) -> Tensor:
        if not bool(grad.abs().max() > self.least):
            return torch.zeros_like(grad)
        wave: Tensor = torch.arange(grad.numel(), dtype=torch.float32, device=grad.device).cos().view_as(grad)
        unit: Tensor = wave / (wave.norm() * (self.gain or 1.0))
        return unit.to(grad.dtype)


def probe(
    engine: Engine, names: Sequence[str], tensors: Arrays, config: TrainConfig, private: PrivateStep | None
) -> Probed:
    """Return which tensors a gradient reaches and an optimizer's step moves.

    Args:
        engine: The engine; it keeps the answer.
        names: The trained tensors.
        tensors: All tensors, for their shapes.
        config: Local training.
        private: Mechanism of DP-SGD; the probe's step goes through its clip, without noise.
    """
    mechanism = None if private is None else replace(private.mechanism, noise_multiplier=0.0)
    key = (frozenset(names), config, mechanism)
    if key not in engine.probed:
        step = None if mechanism is None else PrivateStep(mechanism, [PrivateRandom()])
        engine.probed[key] = _probe(engine, names, tensors, config, step)
    return engine.probed[key]


def _probe(
    engine: Engine, names: Sequence[str], tensors: Arrays, config: TrainConfig, private: PrivateStep | None
) -> Probed:
    rows, drawn, bound = engine.task.made_up_rows(), random_tensors(tensors), negligible(engine)
    start = {name: drawn.pop(name) for name in names}
    work = ClientWork(0, rows, len(rows), [np.arange(len(rows))], start)
    connected: set[str] = set()
    moving: set[str] = set()
    for gain in _GAINS:
        pack = Pack(engine, [work], drawn, config, private)
        watch = Watch(pack.stack)
        # What arrives at one output is smaller than a tensor's gradient, a sum over many of them; so is its rounding.
        (turn,) = pack.turns
        grads = pack.backward(turn, Arrival(gain, least=1e-3 * bound))
        watch.observe(grads, slice(0, 1))
        pack.move(turn, grads)
        seen, still = watch.seen(bound)[0], watch.still()[0]
        connected |= seen
        moving |= seen - still
        if len(moving) == len(names):
            break
    return Probed(frozenset(connected), frozenset(moving))
