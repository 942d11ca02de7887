"""Quantised base models: which a run may have, and how much memory one takes; without what takes seconds to import."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from fedlora.config import ConfigError, ModelConfig

_PACKAGE = "bitsandbytes"
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# Of a quantised weight: 4 bits and, for 64 of them, a scale of 8 bits whose own scale serves 256; or 8 bits.
_QUANTISED_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}


def check_quantisation(model: ModelConfig, saved: Mapping[str, Any] | None) -> None:
    """Refuse a quantised base that cannot be had: of ``model.quantization``, or of a checkpoint saved as one.

    Args:
        model: The model.
        saved: The ``quantization_config`` of the checkpoint's ``config.json``; None: it has none.

    Raises:
        ConfigError: It is quantised twice, or in a way whose rows may depend on each other, or a package is missing.
    """
    kind, method = model.quantization, str((saved or {}).get("quant_method", "an unknown method"))
    if saved and kind != "none":
        raise ConfigError(
            f"model.quantization = {kind!r}: the checkpoint of model.name = {model.name!r} is quantised already (by "
            f"{method}); set model.quantization = 'none', or choose the checkpoint in full precision."
        )
    if saved and (method != _PACKAGE or saved.get("llm_int8_has_fp16_weight")):
        how = "whose activations are quantised, too" if method == _PACKAGE else f"by {method}"
        raise ConfigError(
            f"model.name = {model.name!r}: its checkpoint is quantised {how}. Only the 4 and 8 bits that bitsandbytes "
            "saves are known to leave each row's numbers independent of the other rows, which training clients "
            "together and differential privacy need; choose the checkpoint in full precision and set "
            "model.quantization."
        )
    if (saved or kind != "none") and importlib.util.find_spec(_PACKAGE) is None:
        key = f"model.quantization = {kind!r}" if not saved else f"model.name = {model.name!r}, which is quantised"
        raise ConfigError(
            f"{key}: needs a package that is not installed; install it with: pip install 'fedlora[quantization]'"
        )


def weight_bytes(dtype: str) -> int:
    """Return the bytes of a weight in full precision, at ``engine.dtype``."""
    return _BYTES[dtype]


def base_bytes(parameters: int, quantisable: int, quantization: str, dtype: str) -> int:
    """Return the bytes that a base model's weights take.

    Args:
        parameters: All of them.
        quantisable: Those among them that ``model.quantization`` stores in fewer bits.
        quantization: ``model.quantization``.
        dtype: ``engine.dtype``.
    """
    full = _BYTES[dtype]
    return round(quantisable * _QUANTISED_BYTES.get(quantization, full) + (parameters - quantisable) * full)
