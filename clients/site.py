"""A site: where clients' rows are, and what a server that asks it for work may get to see."""

from __future__ import annotations

WITHHELD = "it failed at the site; its own log says why"
"""All that a site under DP lets out of an error."""


class RefusedError(RuntimeError):
    """A site or client refuses; the message is written for the server, and holds nothing of a row."""


class SiteError(RuntimeError):
    """What a site lets out of an error; the message is for the server."""
