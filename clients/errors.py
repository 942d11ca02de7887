"""What a site lets out of an error."""

from __future__ import annotations

from fedlora.exchange import Outcome

WITHHELD = "it failed at the site; its own log says why"
"""All that a site under DP lets out of an error."""


class RefusedError(RuntimeError):
    """A site or client refuses; the message is written for the server, and holds nothing of a row.

    Args:
        message: Why.
        outcome: How the client's part in the round has ended by it.
    """

    def __init__(self, message: str, outcome: Outcome = Outcome.FAILED) -> None:
        super().__init__(message)
        self.outcome = outcome


class TrainerDiffersError(RefusedError):
    """A trainer came back where it must not work: it sees another disk, or runs another code or base model."""


class SiteError(RuntimeError):
    """What a site lets out of an error; the message is for the server."""


class MemoryShortError(RuntimeError):
    """A trainer had too little memory for a pack; the message may leave the site.

    Attributes:
        trainer: The trainer's number, where a pool has handed it the pack: perhaps in place of another that was lost.
    """

    trainer: int | None = None


class TrainerLostError(RuntimeError):
    """A trainer is gone, or never came; the message may leave the site."""
