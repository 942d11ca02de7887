"""How an error says that there was too little memory: Python's and a GPU's by their kind, others by their words."""

from __future__ import annotations

import errno
from typing import Final

import torch

_WORDS: Final = (  # of torch's plain RuntimeError
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",  # of pinned memory, and of a context
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def memory_was_short(error: Exception) -> bool:
    """Return whether less work at a time may not meet this error."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    by_kind = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return by_kind or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))
