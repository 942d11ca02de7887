"""A base model that is too large for one GPU: transformers spreads it over several, along its blocks."""

from __future__ import annotations

from typing import Any

import torch

from fedlora.config import ConfigError, ModelConfig


def device_map(model: ModelConfig, config: Any, cards: int) -> dict[str, Any]:
    """Return what has ``from_pretrained`` spread a model evenly over the first GPUs of this process, and nothing else.

    Args:
        model: The model.
        config: Its configuration.
        cards: How many GPUs.

    Raises:
        ConfigError: The model is quantised, or there are fewer GPUs.
    """
    if model.quantization != "none" or getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"engine.gpus = {cards}: a quantised base model stays on one GPU; set engine.gpus = 1, or take the "
            "checkpoint in full precision and model.quantization = 'none'."
        )
    there = torch.cuda.device_count()
    if there < cards:
        raise ConfigError(f"engine.gpus = {cards}: this process has {there} GPU(s); lower it.")
    memory = {card: torch.cuda.get_device_properties(card).total_memory for card in range(cards)}
    return {"device_map": "balanced", "max_memory": memory}


def check_spread(model: Any, cards: int) -> None:
    """Refuse a model that is not on its GPUs as a whole, or may have been cut within a block.

    Args:
        model: The model, as ``from_pretrained`` has spread it.
        cards: Over how many GPUs.

    Raises:
        ConfigError: It is, or was.
    """
    family, used = model.config.model_type, set(model.hf_device_map.values())
    if used & {"cpu", "disk"}:
        raise ConfigError(
            f"engine.gpus = {cards}: the base model does not fit onto them; raise it, or set engine.dtype = 'bfloat16'."
        )
    if len(used) > 1 and not model._no_split_modules:
        raise ConfigError(
            f"engine.gpus = {cards}: transformers does not say which modules of a {family} model must stay together, "
            "so it cannot be spread; set engine.gpus = 1."
        )
