"""The watch: a client whose tensors do not train is reported, and one whose rows merely give no gradient is not.

An adapter that is detached, or whose optimizer holds stale tensors, still gives a falling loss (the head learns) and a
well-formed update. But a gradient of zero proves nothing: attention over a single key has none for queries and keys,
nor has a dead ReLU, a saturated softmax or a factor whose partner is still zero; and where rounding makes 1e-17 of it,
that proves nothing either. So real rows can only acquit: a tensor with a gradient well above rounding, that moved, is
trained. Of each other tensor the probe decides (:mod:`fedlora.engine.probe`), on rows and tensors that are nobody's, so
that its verdict is the same for every client and on every machine.

What no probe can see is decided by the tensors themselves: with two factors of a product at zero, or one that is zero
and fixed, no gradient can ever come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.core import Engine, Probed
from fedlora.engine.kernels.row_peaks import Parts, differ, peaks
from fedlora.engine.stack import Stack
from fedlora.engine.work import Arrays
from fedlora.methods import Fault, Method, TensorSpec
from fedlora.transfer import Places

Flags = NDArray[np.bool_]


def negligible(engine: Engine) -> float:
    """Return the share of the largest gradient below which a gradient may be rounding alone.

    Rounding makes about the machine's epsilon of it (2e-16 in float64, 1e-7 in float32), an ordinary tensor more than
    a thousandth. The bound is between: 2e-12 and 6e-6. In bfloat16 nothing lies between; there it is 1e-5, which sees
    exact zeros and little more.
    """
    base = next(engine.base.model.parameters()).dtype
    epsilon = max(torch.finfo(base).eps, torch.finfo(engine.dtype).eps)
    return min(float(epsilon**0.75), 1e-5)


@final
class _Facts(NamedTuple):
    """What is known of a pack's tensors after its round, bool [G, K] each, or [K] of one client.

    Attributes:
        finite: All of a tensor's numbers are.
        seen: It had a gradient well above rounding.
        still: None of its numbers moved.
        zero: All of them are zero.
        zero_at_start: All of them were.
    """

    finite: Flags
    seen: Flags
    still: Flags
    zero: Flags
    zero_at_start: Flags


@final
class Watch:
    """Records, for every client and trained tensor of a pack, how large its gradient was and whether it moved.

    Args:
        stack: The pack's tensors, which remember their start.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._started = stack.started
        self._parts = Parts.of(list(stack.places.values()), stack.values.device)
        self._peak = stack.values.new_zeros((len(stack.values), len(stack.places)))

    def observe(self, grads: Tensor, groups: Places) -> None:
        """Record the gradients of a turn: those of data alone, before noise and penalties.

        Args:
            grads: Gradients of some groups, [a, P].
            groups: Their places.
        """
        self._peak[groups] = torch.maximum(self._peak[groups], peaks(grads, self._parts).to(self._peak.dtype))

    def seen(self, bound: float) -> list[set[str]]:
        """Return for each group the tensors with a gradient above ``bound`` times the group's largest one."""
        return self._named(self._seen(bound))

    def still(self) -> list[set[str]]:
        """Return for each group the tensors none of whose numbers moved."""
        return self._named(self._still())

    def faults(
        self,
        method: Method,
        common: Arrays,
        steps: Sequence[int],
        bound: float,
        probe: Callable[[], Probed],
    ) -> list[str]:
        """Return, for each group, what is wrong with it, or ``""``.

        Args:
            method: The method, for its tensors and its advice.
            common: The tensors that are not trained.
            steps: Steps with rows that each group took; without any, nothing is expected of it.
            bound: See :func:`negligible`.
            probe: Called where a group's own rows do not acquit a tensor.
        """
        verdict = _Verdict(method, list(self._stack.places), common, probe)
        facts = self._facts(bound)
        shrunk = facts.zero & verdict.penalised
        suspect = ~facts.finite | ~facts.seen | facts.still | shrunk
        return [
            verdict.of(n, suspect[g], _Facts(*(fact[g] for fact in facts))) if n else "" for g, n in enumerate(steps)
        ]

    def _facts(self, bound: float) -> _Facts:
        """Return the facts, fetched from the device at once."""
        sizes = peaks(self._stack.values, self._parts)
        at_start = peaks(self._started.rows, self._parts)[self._started.row_g]
        flags = [sizes.isfinite(), self._seen(bound), self._still(), sizes == 0, at_start == 0]
        return _Facts(*torch.stack(flags).cpu().numpy())

    def _seen(self, bound: float) -> Tensor:
        return self._peak > bound * self._peak.amax(1, keepdim=True)

    def _still(self) -> Tensor:
        return ~differ(self._stack.values, *self._started, self._parts)

    def _named(self, flags: Tensor) -> list[set[str]]:
        """Return for each group the tensors that have the flag, bool [G, K]."""
        return [{name for name, flag in zip(self._stack.places, row, strict=True) if flag} for row in flags.tolist()]


@final
class _Verdict:
    """Tells what is wrong with a client, of all clients of a pack.

    Args:
        method: The method.
        names: The trained tensors, in the order of facts.
        common: The tensors that are not trained.
        probe: Called where a client's own rows do not acquit a tensor.
    """

    def __init__(self, method: Method, names: Sequence[str], common: Arrays, probe: Callable[[], Probed]) -> None:
        self._method, self._names, self._common, self._probe = method, names, common, probe
        self._specs = method.specs()
        self._stuck: dict[tuple[str, bytes], bool] = {}  # clients differ little in it, and each answer takes its time
        self.penalised = np.array([bool(self._specs[name].l1) for name in names])

    def of(self, n: int, suspect: Flags, facts: _Facts) -> str:
        """Return what is wrong with a client that took so many steps, or ``""``; only suspects are looked at."""
        places = np.flatnonzero(suspect).tolist()
        for place in places:
            name = self._names[place]
            if not facts.finite[place]:
                return f"{name} is not finite after {n} steps; lower train.learning-rate or set train.clip-norm"
        for place in places:
            if facts.seen[place] and facts.zero[place] and self.penalised[place]:
                name = self._names[place]
                return (
                    f"the proximal step set all of {name} to zero in {n} steps, so nothing is left to train; lower the "
                    f"weight of its L1 penalty, {self._specs[name].l1}{_brackets(self._method.advice(Fault.ZEROED))}"
                )
        for place in places:
            name = self._names[place]
            if not facts.seen[place] and self._is_stuck(name, facts.zero_at_start):
                advice = _brackets(self._method.advice(Fault.HIDDEN))
                return f"{name} never had a gradient in {n} steps: {Fault.HIDDEN.value}{advice}"
        doubtful = [self._names[place] for place in places if not facts.seen[place] or facts.still[place]]
        if not doubtful:
            return ""
        probed = self._probe()
        for name in doubtful:
            if name not in probed.connected:
                return f"{name} never had a gradient in {n} steps: it is not connected to the loss"
            if name not in probed.moving:
                return f"{name} has a gradient but did not move in {n} steps: train.learning-rate is too small for it"
        return ""

    def _is_stuck(self, name: str, zero_at_start: Flags) -> bool:
        key = name, zero_at_start.tobytes()
        if key not in self._stuck:
            zero = self._zero | {self._names[place] for place in np.flatnonzero(zero_at_start).tolist()}
            self._stuck[key] = is_stuck(name, self._specs, zero, self._names)
        return self._stuck[key]

    @cached_property
    def _zero(self) -> set[str]:
        return {name for name, value in self._common.items() if not np.any(value)}


def _brackets(text: str) -> str:
    return f" ({text})" if text else ""


def is_stuck(name: str, specs: Mapping[str, TensorSpec], zero: Set[str], trained: Sequence[str]) -> bool:
    """Return whether no gradient can ever come to a tensor, because of zeros that it is multiplied with.

    A factor that is zero hides the others of its product until it has moved, which it does if it is trained and
    no other factor is zero. Not counted is a fixed one that is zero by the rows of earlier rounds, and not by its role
    or by mistake: others of its kind are fixed at something.

    Args:
        name: The trained tensor.
        specs: The method's tensors.
        zero: Tensors that are all zero at the start, fixed ones too.
        trained: The trained tensors.
    """
    for product in specs[name].factors:
        factors: dict[str, list[str]] = {}
        for other, spec in specs.items():
            if product in spec.factors:
                factors.setdefault(spec.kind[0], []).append(other)
        empty = [letter for letter, parts in factors.items() if set(parts) <= zero]
        hiding = [letter for letter in empty if letter != specs[name].kind[0]]
        if not hiding:
            return False
        if len(empty) == 1:
            parts = factors[hiding[0]]
            kinds = {specs[part].kind for part in parts}
            alike = [other for other, spec in specs.items() if spec.kind in kinds and other not in trained]
            if not set(parts).isdisjoint(trained) or not set(alike) <= zero:
                return False
    return True
