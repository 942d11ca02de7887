"""Whether a base model is there: in a local folder, in the hub's cache, or at a Hugging Face hub within reach."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download, try_to_load_from_cache

from fedlora.config import BUNDLED, SMALL_LLAMA, ModelConfig
from fedlora.messages import first_line
from fedlora.quantisation import check_quantisation

_TIMEOUT_S = 4.0
_CONFIG = "config.json"  # every checkpoint that transformers loads has one
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_WEIGHTS = ("*.safetensors", "*.bin")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"  # in one file, or a list of several


@cache
def hub_answers() -> bool:
    """Return whether the hub can be reached. Without a network its client goes on trying for half a minute."""
    try:
        httpx.head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except (httpx.HTTPError, OSError):
        return False
    return True


def check_model(model: ModelConfig) -> None:
    """Refuse a model that is nowhere to be had, without what takes seconds to import.

    Raises:
        ValueError: Its folder holds none, or, of a name of the hub, neither the cache nor the hub has it; or it is
            quantised, or is to be, in a way that cannot be.
    """
    if model.name in (BUNDLED, SMALL_LLAMA):
        check_quantisation(model, None)
        return
    folder = Path(model.name)
    with found(model):
        if folder.is_dir():
            if not (folder / _CONFIG).is_file():
                raise FileNotFoundError(f"the folder has no {_CONFIG}")
            if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
                raise FileNotFoundError(f"the folder has no weights, {' or '.join(_WEIGHTS)}")
        elif folder.is_absolute() or model.name.startswith((".", "~")) or model.name.count("/") > 1:
            raise FileNotFoundError("there is no such folder")
        saved = json.loads(_config_file(model).read_text(encoding="utf-8")).get("quantization_config")
    check_quantisation(model, saved)


def _config_file(model: ModelConfig) -> Path:
    """Return a checkpoint's configuration file: of its folder, of the hub's cache, or fetched from the hub.

    Raises:
        OSError: There is none within reach.
        ValueError: The name is none of the hub.
    """
    folder, revision = Path(model.name), model.revision or None
    if folder.is_dir():
        return folder / _CONFIG
    cached = try_to_load_from_cache(model.name, _CONFIG, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE or not hub_answers():
        why = "is switched off" if constants.HF_HUB_OFFLINE else "cannot be reached"
        raise FileNotFoundError(f"it is no folder, it is not in the hub's cache, and the hub {why}")
    return Path(hf_hub_download(model.name, _CONFIG, revision=revision))


def layer_width(model: ModelConfig) -> int | None:
    """Return the width of a model's layers as its ``config.json`` says, without what takes seconds to import.

    Args:
        model: A folder, or a name of the hub.

    Returns:
        The width; None where the file does not say, or is not within reach.
    """
    try:
        config = json.loads(_config_file(model).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # what is wrong with it is said when it is loaded
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config  # beside other parts
    return next((int(text[key]) for key in _WIDTHS if isinstance(text.get(key), int)), None)


def num_weights(model: ModelConfig) -> int:
    """Return how many numbers a checkpoint in full precision holds, by the heads of its files, without reading them.

    Args:
        model: A folder, or a name of the hub.

    Returns:
        The numbers; 0 where they are not known: of a quantised checkpoint, of one in another format than safetensors,
        and of one out of reach.
    """
    if model.name in (BUNDLED, SMALL_LLAMA):
        return 0  # a few MB
    try:
        if json.loads(_config_file(model).read_text(encoding="utf-8")).get("quantization_config"):
            return 0
        index, whole = _weights_file(model, _INDEX), _weights_file(model, _WHOLE)
        if index is not None:
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            files = [_weights_file(model, name) for name in names]
        else:
            files = [whole]
        if all(file is not None for file in files):
            return sum(_numbers_in(file) for file in files if file is not None)
        return sum(get_safetensors_metadata(model.name, revision=model.revision or None).parameter_count.values())
    except Exception:  # of the hub's client, or of a broken file: what is wrong is said when it is loaded
        return 0


def _weights_file(model: ModelConfig, name: str) -> Path | None:
    """Return a file of a checkpoint's folder, or of the hub's cache; None: it is not there."""
    folder = Path(model.name)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    cached = try_to_load_from_cache(model.name, name, revision=model.revision or None)
    return Path(cached) if isinstance(cached, str) else None


def _numbers_in(file: Path) -> int:
    """Return how many numbers a safetensors file holds: its head is JSON, after the length of that in eight bytes."""
    with file.open("rb") as opened:
        head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")


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
    "offload": "It does not fit onto the GPUs of one trainer; raise engine.gpus, or set engine.dtype = 'bfloat16'.",
    "unrecognized configuration class": "transformers has no model of this family for the task; choose another model.",
}
"""Cures by what an error's text has in it."""
