"""The update of a layer by a square matrix between sums of its inputs and copies of its outputs: ``C R S x``.

S [q, d_in] adds up inputs q apart, ``(S x)_i = sum_j x_(i + j q)``. Where q does not divide d_in, the first inputs
stand once more behind the last one, up to the next multiple of q. C [d_out, q] repeats the q outputs, the last time as
far as there is room: ``y_i = (R S x)_(i mod q)``. As a product of A = S and B = C R each group would have d_out q
numbers; here it has R's q^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Square(NamedTuple):
    """What a layer adds to its base: ``y = W x + C R S x``."""

    R: Tensor  # [*, q, q]
    d_in: int  # q at least
    d_out: int

    def of(self, x: Tensor) -> Tensor:
        """Return what is added for inputs [*, T, d_in], [*, T, d_out]."""
        import torch

        size = self.R.shape[-1]
        whole = torch.cat([x, x[..., : -self.d_in % size]], -1) if self.d_in % size else x
        sums: Tensor = whole.unflatten(-1, (-1, size)).sum(-2)  # type: ignore[no-untyped-call]
        return (sums @ self.R.to(x.dtype).mT).tile(-(-self.d_out // size))[..., : self.d_out]

    def product(self) -> tuple[Tensor, Tensor]:
        """Return the same as factors A [q, d_in] and B [*, d_out, q]."""
        import torch

        size = self.R.shape[-1]
        once = torch.eye(size, dtype=self.R.dtype, device=self.R.device).tile(-(-self.d_in // size))
        a = once[:, : self.d_in].clone()
        a[:, : -self.d_in % size] += once[:, self.d_in :]
        return a, self.R.tile(-(-self.d_out // size), 1)[..., : self.d_out, :]
