"""Adapters that are to be merged: what their files say without the numbers in them, and whether they fit together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import ConfigError
from fedlora.lora_files import (
    CONFIG,
    PREFIX,
    layer_scale,
    read_about,
    read_shapes,
    read_weights,
    same_base,
    unlike_plain,
)
from fedlora.methods.products import Product

_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")


@final
@dataclass(frozen=True)
class Source:
    """An adapter that is to be merged, by what its files say without the numbers in them.

    Attributes:
        folder: Where it is.
        about: Its ``adapter_config.json``.
        layers: The shapes of A [r, d_in] and B [d_out, r] of each layer.
        others: The shapes of its other tensors, those of modules that PEFT saves whole.
        wide: Whether it is in float64.
    """

    folder: Path
    about: Mapping[str, Any]
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    others: Mapping[str, tuple[int, ...]]
    wide: bool

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read an adapter's folder, or the one in a run's folder.

        Raises:
            ConfigError: It holds no plain LoRA.
        """
        if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
            folder = folder / "adapter"
        try:
            about, tensors = read_about(folder), read_shapes(folder)
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}.") from error
        if reason := unlike_plain(about):
            raise _refusal(folder, reason)
        factors: dict[str, dict[str, tuple[int, ...]]] = {}
        others: dict[str, tuple[int, ...]] = {}
        whole = set(about.get("modules_to_save") or ())
        for name, (dtype, shape) in tensors.items():
            if dtype not in _FLOATS:
                raise _refusal(folder, f"{name} is of the type {dtype}, which has no mean")
            match = _FACTOR.fullmatch(name)
            if match:
                factors.setdefault(match[1], {})[match[2]] = shape
            elif whole & set(name.split(".")):
                others[name] = shape
            else:
                raise _refusal(folder, f"{name} is neither A or B of a linear layer nor in modules_to_save")
        if not factors:
            raise _refusal(folder, "it has no A and B of any linear layer")
        for layer, pair in factors.items():
            shapes = [pair.get(letter, ()) for letter in "AB"]
            if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
                raise _refusal(folder, f"{layer} has factors of {list(shapes[0])} and {list(shapes[1])}")
        layers = {layer: (pair["A"], pair["B"]) for layer, pair in factors.items()}
        return cls(folder, about, layers, others, any(dtype == "F64" for dtype, _ in tensors.values()))

    @property
    def base(self) -> str:
        """The base model, as the adapter names it."""
        return str(self.about.get("base_model_name_or_path") or "")

    def load(self) -> tuple[dict[str, Product], dict[str, NDArray[np.floating]]]:
        """Return its factors by layer, the scale in B, and its other tensors.

        Raises:
            ConfigError: They have numbers that are not finite.
        """
        weights = read_weights(self.folder)
        wrong = next((name for name, value in weights.items() if not np.isfinite(value).all()), None)
        if wrong:
            raise _refusal(self.folder, f"{wrong} has numbers that are not finite")
        products = {}
        for layer, ((rank, _), _) in self.layers.items():
            a, b = (weights.pop(f"{PREFIX}{layer}.lora_{letter}.weight").astype(np.float64) for letter in "AB")
            products[layer] = a, b * layer_scale(self.about, layer, rank)
        return products, weights


def check_alike(sources: Sequence[Source]) -> None:
    """Refuse adapters that are not of one base model and of the same layers of it.

    Raises:
        ConfigError: One differs from the first, with what differs.
    """
    first = sources[0]
    for one in sources[1:]:
        for what, its, own in _differences(one, first):
            if its != own:
                raise _refusal(
                    one.folder,
                    f"{what} {its}, and of {first.folder} {own}; merge adapters of the same layers of one model",
                )


def _differences(one: Source, first: Source) -> Iterator[tuple[str, Any, Any]]:
    """Yield what must be the same in two adapters, in words, and as each of them has it."""
    if not same_base(one.base, first.base):
        yield "its base model is", one.base, first.base
    for key, default in (("revision", "main"), ("task_type", None), ("fan_in_fan_out", False)):
        yield key, one.about.get(key) or default, first.about.get(key) or default
    yield "it adapts the modules", _modules(one), _modules(first)
    yield "beside its factors it has", _listed(one.others), _listed(first.others)
    for layer in one.layers.keys() & first.layers.keys():
        its, own = (f"{a[1]} features in and {b[0]} out" for a, b in (one.layers[layer], first.layers[layer]))
        yield f"{layer} has", its, own


def _modules(source: Source) -> str:
    """Return the names of the modules that an adapter is on; of which blocks may differ, where updates are zero."""
    return ", ".join(sorted({layer.rpartition(".")[2] for layer in source.layers}))


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name.removeprefix(PREFIX)} {list(shapes[name])}" for name in sorted(shapes)) or "nothing"


def _refusal(folder: Path, why: str) -> ConfigError:
    return ConfigError(f"{folder}: the adapter cannot be merged: {why}.")
