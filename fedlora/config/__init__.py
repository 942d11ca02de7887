"""The run configuration: frozen dataclasses, the one source of defaults, types and ranges.

Flower hands over flat, untyped values (``train.batch-size = 16``). A :class:`Schema` turns them into a :class:`Config`,
or raises a :class:`ConfigError` that names the dotted key; :mod:`fedlora.plugins` has the schema of all that is
registered. The table ``[tool.flwr.app.config]`` in ``pyproject.toml`` is generated from the defaults (``make config``).
"""

from __future__ import annotations

from fedlora.config.data_section import DataConfig
from fedlora.config.fields import (
    ConfigError,
    Options,
    Scalar,
    at_least,
    flatten,
    from_toml,
    one_of,
    positive,
    require,
    share,
    to_toml,
)
from fedlora.config.schema import Config, Schema
from fedlora.config.sections import (
    BUNDLED,
    SMALL_LLAMA,
    FederationConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
)
from fedlora.config.training import (
    PLAIN_GRADIENT,
    EngineConfig,
    EvalConfig,
    LocalConfig,
    PrivacyConfig,
    ServerConfig,
    TrainConfig,
)

__all__ = [
    "BUNDLED",
    "PLAIN_GRADIENT",
    "SMALL_LLAMA",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "FederationConfig",
    "LocalConfig",
    "MethodConfig",
    "ModelConfig",
    "Options",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "Schema",
    "ServerConfig",
    "StrategyConfig",
    "TrainConfig",
    "at_least",
    "flatten",
    "from_toml",
    "one_of",
    "positive",
    "require",
    "share",
    "to_toml",
]
