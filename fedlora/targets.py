"""What ``method.target-modules`` may say, as far as it can be read without a model."""

from __future__ import annotations

import re

_SYNTAX = re.compile(r"[\\*+?()\[\]^$|{}]")  # no module's name has any of these


def is_pattern(target_modules: str) -> bool:
    """Return whether ``method.target-modules`` is a regular expression, which full module names must match whole."""
    return _SYNTAX.search(target_modules) is not None
