"""What a method holds fixed beside its tensors: arrays that follow from the run's seed, such as indices and bases.

They have no role and are never sent, whatever the strategy; every machine makes the same. A device has them once, in
each precision that is asked for, whatever the number of clients in a pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.seeded import Key, Seeded

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@final
class Fixed:
    """Fixed arrays as tensors, made when they are first asked for.

    Args:
        make: Returns an array by its key.
    """

    def __init__(self, make: Callable[[tuple[str, ...]], NDArray[Any]]) -> None:
        self._make = make
        self._placed: dict[tuple[tuple[str, ...], torch.device, torch.dtype | None], Tensor] = {}

    def on(self, device: torch.device, *key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return an array on a device.

        Args:
            device: Where it is wanted.
            key: Its key.
            dtype: In which precision; None: as it was made.
        """
        import torch

        place = key, device, dtype
        if place not in self._placed:
            # A tensor made in inference mode, as in evaluation, could not be trained with.
            with torch.inference_mode(mode=False):
                self._placed[place] = torch.from_numpy(self._make(key)).to(device, dtype)
        return self._placed[place]


def random_basis(seeded: Seeded, *key: Key, shape: tuple[int, ...], bound: float) -> NDArray[np.float32]:
    """Return numbers uniform on [-bound, bound), each rounded to one that bfloat16 holds.

    So a base model of any precision computes with the very same numbers, and an exported adapter holds them exactly.
    """
    mantissa, exponent = np.frexp(seeded.uniform("basis", *key, shape=shape, bound=bound))
    rounded: NDArray[np.float32] = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    return rounded
