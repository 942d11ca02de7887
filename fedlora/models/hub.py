"""How checkpoints are found: in a local folder, in the hub's cache, or at the hub where it can be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from fedlora.config import ModelConfig
from fedlora.hub import hub_answers
from fedlora.messages import first_line
from fedlora.models.names import prepare_model


def options(model: ModelConfig) -> dict[str, Any]:
    """Return what every ``from_pretrained`` of a model gets beside its place."""
    local = Path(place(model)).is_dir()
    return {
        "revision": model.revision or None,
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": local or constants.HF_HUB_OFFLINE or not hub_answers(),
    }


def place(model: ModelConfig) -> str:
    """Return the folder or hub name that ``model.name`` stands for; a model that this machine makes is made first."""
    return prepare_model(model.name)


@contextmanager
def found(model: ModelConfig) -> Iterator[None]:
    """Turn the many errors of a model that is not there, or cannot be loaded, into one that names the cure.

    Raises:
        ValueError: For any of them.
    """
    try:
        yield
    except Exception as error:  # of transformers and of every reader behind it
        text = f"{type(error).__name__} {error}".lower()
        cure = (
            "Either set model.name to a local folder that holds config.json, the weights and the tokenizer, or connect "
            "to the network once so that the hub model is cached. The bundled model.name = 'minilm' needs neither."
        )
        for sign, better in _CURES.items():
            if sign in text:
                cure = better
                break
        raise ValueError(f"model.name = {model.name!r}: cannot be loaded ({first_line(error)}). {cure}") from error


_CURES = {
    "trust_remote_code": "It runs code of its own; set model.trust-remote-code = true if you trust its authors.",
    "error parsing line": "Its SentencePiece file is broken, or the package does not fit that of protobuf (then: pip "
    "install 'fedlora[sentencepiece]').",
    "sentencepiece": "Its tokenizer needs SentencePiece: pip install 'fedlora[sentencepiece]'.",
    "tiktoken": "Its tokenizer needs SentencePiece: pip install 'fedlora[sentencepiece]'.",
    "quantiz": "It is quantised, which needs that package and often a GPU; choose the checkpoint in full precision.",
    "unrecognized configuration class": "transformers has no model of this family for the task; choose another model.",
}
"""Cures by what an error's text has in it."""
