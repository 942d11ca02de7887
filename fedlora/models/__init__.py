"""Base models: finding and loading them, the layers that a run adapts, and a small one that a machine trains itself."""

from fedlora.models.loading import (
    Base,
    check_length,
    inspect_by_name,
    load_base,
    load_config,
    load_tokenizer,
    prepare_base,
)
from fedlora.models.names import BUNDLED, model_path, prepare_model
from fedlora.models.structure import Structure, inspect

__all__ = [
    "BUNDLED",
    "Base",
    "Structure",
    "check_length",
    "inspect",
    "inspect_by_name",
    "load_base",
    "load_config",
    "load_tokenizer",
    "model_path",
    "prepare_base",
    "prepare_model",
]
