"""Where the rows of a batch sit among the groups of a pack, and their tokens where rows lie without padding.

Shapes: `N` rows of a batch, `G` groups (clients of a pack, under DP rows), `S` places a group, `T` positions of the
longest row, `M` tokens of all rows without padding, `d` features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.kernels.attention import Rows
from fedlora.transfer import Spans, to_device


@final
@dataclass(frozen=True)
class Layout:
    """Which rows of a batch, or which of its tokens, belong to which group.

    Attributes:
        groups: G.
        slots: S, the largest number of rows of a group.
        index_n: For each row its place ``group * S + slot``; None when rows are sorted by group and every
            group has exactly S (then places are row numbers).
        spans: For the low-rank kernel each row's group and each group's first row; None: it is not used.
        tokens: Whether its "rows" are tokens side by side, [1, M, ...], as in :class:`Unpadded`.
        unpadded: How the model's blocks see the batch; None: padded, as the model does.
    """

    groups: int
    slots: int
    index_n: Tensor | None
    spans: Spans | None = None
    tokens: bool = False
    unpadded: Unpadded | None = None

    @classmethod
    def of(
        cls,
        group_n: NDArray[np.int64],
        groups: int,
        device: torch.device,
        *,
        kernel: bool = False,
        tokens: bool = False,
        unpadded: Unpadded | None = None,
    ) -> Layout:
        """Return the layout of rows that belong to the groups ``group_n`` ([N]), made on the host.

        Args:
            group_n: The group of each row.
            groups: G.
            device: Where the rows are.
            kernel: Whether the low-rank kernel computes; rows are then sorted by group.
            tokens: See the class.
            unpadded: See the class.
        """
        counts = np.bincount(group_n, minlength=groups)
        slots, starts = int(counts.max()), np.cumsum(counts) - counts
        order = np.argsort(group_n, kind="stable")
        slot_n = np.empty_like(group_n)
        slot_n[order] = np.arange(len(group_n)) - starts[group_n[order]]
        index_n = group_n * slots + slot_n
        even = len(index_n) == groups * slots and bool((index_n == np.arange(len(index_n))).all())
        spans = Spans.of(group_n, groups, device) if kernel else None
        return cls(groups, slots, None if even else to_device(index_n, device), spans, tokens, unpadded)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return self.groups * self.slots if self.index_n is None else len(self.index_n)

    def of_rows(self, x: Tensor, rows: int) -> bool:
        """Return whether ``x`` is the batch's ``rows`` rows, [N, ...], or tokens, [1, M, ...]."""
        return x.shape[int(self.tokens)] == rows

    def to_groups(self, x_n: Tensor) -> Tensor:
        """Turn [N, ..., d] into [G, S * ..., d]; places without a row are zero."""
        x_n = x_n[0] if self.tokens else x_n
        if self.index_n is not None:
            empty = x_n.new_zeros((self.groups * self.slots, *x_n.shape[1:]))
            x_n = empty.index_copy(0, self.index_n, x_n)
        return x_n.reshape(self.groups, -1, x_n.shape[-1])

    def to_rows(self, x_g: Tensor, like: Tensor) -> Tensor:
        """Turn [G, S * ..., d] back into [N, ..., d], with the middle dimensions of ``like``."""
        middle = () if self.tokens else like.shape[1:-1]
        x_n = x_g.reshape(-1, *middle, x_g.shape[-1])
        x_n = x_n if self.index_n is None else x_n.index_select(0, self.index_n)
        return x_n[None] if self.tokens else x_n


@final
@dataclass(frozen=True)
class Unpadded:
    """A batch's tokens side by side, [1, M, d], in place of rows with padding, [N, T, d].

    Attributes:
        shape: N and T.
        kept: The tokens' places among ``N * T``, int64 [M]; None: all of them are tokens.
        rows: Where each row begins, for attention.
        layout: Which token belongs to which group.
    """

    shape: tuple[int, int]
    kept: Tensor | None
    rows: Rows
    layout: Layout
    _packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        length_n: NDArray[np.int64],
        group_n: NDArray[np.int64],
        groups: int,
        device: torch.device,
        *,
        kernel: bool = False,
    ) -> Unpadded:
        """Return how rows of these lengths lie without padding, made on the host; padding stands behind their tokens.

        Args:
            length_n: Tokens of each row, [N].
            group_n: Its group; rows are sorted by group.
            groups: G.
            device: Where the rows are.
            kernel: Whether the low-rank kernel computes.
        """
        count, longest = len(length_n), int(length_n.max())
        starts = np.concatenate([[0], np.cumsum(length_n)])
        kept = None
        if starts[-1] < count * longest:
            own = np.arange(longest) < length_n[:, None]
            kept = to_device(np.flatnonzero(own), device)
        layout = Layout.of(np.repeat(group_n, length_n), groups, device, kernel=kernel, tokens=True)
        return cls((count, longest), kept, Rows.of(starts, longest, device), layout)

    def pack(self, x: Tensor) -> Tensor:
        """Turn [N, T, ...], or [1, T, ...] that all rows have in common, into [1, M, ...]."""
        flat = x.expand(self.shape[0], *x.shape[1:]).reshape(-1, *x.shape[2:])
        return (flat if self.kept is None else flat.index_select(0, self.kept))[None]

    def pack_once(self, x: Tensor) -> Tensor:
        """Return the same of what the model gives to each of its blocks, computed for the first of them."""
        if id(x) not in self._packed:
            self._packed[id(x)] = x, self.pack(x)  # x is kept, so that its number stays its own
        return self._packed[id(x)][1]

    def unpack(self, x: Tensor) -> Tensor:
        """Turn [1, M, ...] back into [N, T, ...]; padding is zero."""
        flat = x[0]
        if self.kept is not None:
            flat = flat.new_zeros((self.shape[0] * self.shape[1], *flat.shape[1:])).index_copy(0, self.kept, flat)
        return flat.reshape(*self.shape, *flat.shape[1:])
