"""What a client's round amounts to before it is trained: steps, examples, tokens; arithmetic on counts alone."""

from __future__ import annotations

from fedlora.config import Config, TrainConfig

# What a pack holds of each trained number on its device, at the most: the number itself, its gradient, both once more
# in the base model's precision, and for the watch the start and the largest gradient. Then the optimizer's moments, and
# with a term of the local objective the start, two control variates and a gradient of all rows.
_HELD = 6
_MOMENTS = {"adamw": 2, "sgd": 1}
_TERMS = 4


def local_steps(rows: int, train: TrainConfig) -> int:
    """Return the steps that a client with so many training rows takes in a round."""
    return train.local_steps or train.local_epochs * -(-rows // train.batch_size)


def examples_seen(rows: int, train: TrainConfig) -> int:
    """Return the examples that it sees: epoch after epoch, the last batch of each short."""
    if not rows:
        return 0
    epochs, rest = divmod(local_steps(rows, train), -(-rows // train.batch_size))
    return epochs * rows + rest * train.batch_size  # those of an epoch that is not whole are full


def predicted_tokens(examples: float, row_tokens: float) -> float:
    """Return the tokens of a client's round, by which it is dealt to a trainer.

    Args:
        examples: The examples that it sees; under DP those that it is expected to draw.
        row_tokens: The mean tokens of its rows.
    """
    return examples * row_tokens


def pack_bytes(numbers: int, config: Config) -> int:
    """Return the bytes that a client's trained numbers take in a pack, with all that training keeps beside them.

    Args:
        numbers: The numbers that a client trains.
        config: The run's configuration.
    """
    held = _HELD + _MOMENTS[config.train.optimizer] + (0 if config.local.term == "none" else _TERMS)
    return numbers * held * (8 if config.engine.tensor_dtype == "float64" else 4)
