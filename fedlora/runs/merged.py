"""A merged adapter: written as a PEFT folder, and held against what PEFT reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn

from fedlora.lora_files import PREFIX, WEIGHTS, rank_settings
from fedlora.methods.products import Product
from fedlora.models.quiet import quiet
from fedlora.runs.export_check import ExportError, same_update


def write_adapter(
    folder: Path,
    products: Mapping[str, Product],
    others: Mapping[str, NDArray[np.floating]],
    like: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write a LoRA as PEFT does.

    Args:
        folder: Where to; it is there.
        products: A [r, d_in] and B [d_out, r] of each layer, the scale in B.
        others: Its other tensors, by their names in the file.
        like: ``adapter_config.json`` of an adapter of the same base.
        dtype: Of the tensors.
    """
    kept = ("task_type", "base_model_name_or_path", "revision", "modules_to_save", "fan_in_fan_out")
    ranks = {layer: len(a) for layer, (a, _) in products.items()}
    settings = {key: like[key] for key in kept if key in like} | rank_settings(ranks)
    LoraConfig(inference_mode=True, **settings).save_pretrained(folder)
    weights = dict(others)
    for layer, (a, b) in products.items():
        weights |= {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).to(dtype) for name, value in weights.items()}
    save_file(tensors, folder / WEIGHTS)


def check_written(folder: Path, products: Mapping[str, Product]) -> None:
    """Load a LoRA in plain PEFT, on layers of zeros that take no memory, and compare what it adds to each.

    Raises:
        ExportError: It is something else, or PEFT cannot load it.
    """
    base = nn.Module()
    for layer, (a, b) in products.items():
        *parents, name = layer.split(".")
        module = base
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        leaf = nn.Linear(a.shape[1], len(b), bias=False, device="meta")
        leaf.weight = nn.Parameter(torch.zeros((), dtype=torch.float64).expand(len(b), a.shape[1]))  # one number
        module.add_module(name, leaf)
    config = LoraConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save = None, None  # of the layers alone
    with quiet():
        try:
            adapted = PeftModel.from_pretrained(base, str(folder), config=config, torch_device="cpu")
        except (ValueError, RuntimeError, KeyError) as error:
            raise ExportError(f"{folder}: the merged adapter cannot be loaded in PEFT: {error}") from error
    for layer, (a, b) in products.items():
        if not same_update(adapted.get_submodule(f"{PREFIX}{layer}"), a, b):
            raise ExportError(
                f"{folder}: what PEFT reads of the merged adapter at {layer} is not what was merged. The adapter would "
                "be unusable; this is a fault of fedlora, please report it."
            )
