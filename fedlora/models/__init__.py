"""Base models: finding and loading them, the layers that a run adapts, and a small one that a machine trains itself."""

from fedlora.models.adapter_start import adapter_start
from fedlora.models.head_start import head_words, keeps_head, trained_labels
from fedlora.models.loading import (
    Base,
    check_length,
    inspect_by_name,
    load_base,
    load_config,
    load_tokenizer,
    own_config,
    prepare_base,
)
from fedlora.models.names import model_path, prepare_model
from fedlora.models.structure import Structure, head_modules, inspect

__all__ = [
    "Base",
    "Structure",
    "adapter_start",
    "check_length",
    "head_modules",
    "head_words",
    "inspect",
    "inspect_by_name",
    "keeps_head",
    "load_base",
    "load_config",
    "load_tokenizer",
    "model_path",
    "own_config",
    "prepare_base",
    "prepare_model",
    "trained_labels",
]
