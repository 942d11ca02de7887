"""Which of many known rows are in a noisy sum of their gradients: the server's view of one step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shares_in_sum(
    released: NDArray[np.float64], gradients: NDArray[np.float64], deviation: float
) -> NDArray[np.float64]:
    """Return for each row how far it seems to be in the sum, 0 to 1 but for the noise, [m].

    The best linear estimate, where each row is in with probability one half and the noise is Gaussian: with one row the
    inner product of release and gradient, with many the same after what the other rows explain is taken off.

    Args:
        released: The sum of the gradients of those that are in, plus noise, [P].
        gradients: The clipped gradients of all of them, [m, P].
        deviation: The noise's standard deviation.
    """
    gram = gradients @ gradients.T
    gram[np.diag_indices_from(gram)] += 4 * deviation**2  # the variance of a share is a quarter
    shares: NDArray[np.float64] = np.linalg.solve(gram, gradients @ (released - gradients.sum(0) / 2)) + 0.5
    return shares
