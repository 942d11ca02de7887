"""The Hugging Face hub: whether it can be reached, asked once, before its client tries again and again."""

from __future__ import annotations

from functools import cache

import httpx
from huggingface_hub import constants

_TIMEOUT_S = 4.0


@cache
def hub_answers() -> bool:
    """Return whether the hub can be reached. Without a network its client goes on trying for half a minute."""
    try:
        httpx.head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except (httpx.HTTPError, OSError):
        return False
    return True
