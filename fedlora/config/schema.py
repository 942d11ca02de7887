"""The whole configuration, and the schema that reads it: the core sections and the options of registered plug-ins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar, final, get_type_hints

from fedlora.config.data_section import DataConfig
from fedlora.config.fields import ConfigError, Options, Scalar, at_least, coerce, dotted, require
from fedlora.config.sections import FederationConfig, MethodConfig, ModelConfig, RunConfig, StrategyConfig
from fedlora.config.training import EngineConfig, EvalConfig, LocalConfig, PrivacyConfig, ServerConfig, TrainConfig
from fedlora.messages import closest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionsT = TypeVar("OptionsT", bound=Options)


@final
@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    """Seed of everything but privacy."""
    rounds: int = 3
    """Communication rounds."""
    task: str = "classification"
    """What is learned: ``classification`` of texts, ``multi-label`` (several labels a text, or none), ``regression`` (a
    number a text), or with ``causal-lm`` to write an answer to a prompt, or the assistant's turns of a conversation."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    plugin_options: tuple[Options, ...] = ()
    """Sections of plug-ins, by :meth:`options`; one that is not here has its defaults."""
    foreign: tuple[tuple[str, Scalar], ...] = ()
    """Keys, with their values, of sections that nothing registered in this process has."""
    train: TrainConfig = field(default_factory=TrainConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        """Check the fields, and sections against each other."""
        at_least("seed", self.seed, 0)
        at_least("rounds", self.rounds, 1)
        dp = self.privacy.mode == "dp"
        require(
            not dp or self.train.clip_norm == 0,
            "train.clip-norm",
            self.train.clip_norm,
            "each row's gradient is clipped to privacy.max-grad-norm here; leave it at 0.",
        )
        require(
            self.eval.test or self.data.dev_share > 0,
            "eval.test",
            self.eval.test,
            "without test rows the run needs others to be measured on: set data.dev-share.",
        )
        require(
            self.model.quantization == "none" or self.engine.dtype != "float64",
            "model.quantization",
            self.model.quantization,
            "goes with engine.dtype = 'float32' or 'bfloat16', not 'float64', in which bitsandbytes does not compute.",
        )
        require(
            self.model.quantization == "none" or self.engine.gpus <= 1,
            "engine.gpus",
            self.engine.gpus,
            f"a base model with model.quantization = {self.model.quantization!r} stays on one GPU; set 1.",
        )
        if self.local.term == "scaffold":
            self._check_scaffold(dp)
        self._check_public()
        self._check_sites(dp)

    def _check_public(self) -> None:
        """Refuse a start that would look at clients' rows, and public rows that nothing reads."""
        gradient, path = self.method.reads_public_rows, self.data.public_path
        require(
            not gradient or path != "",
            "method.init",
            self.method.init,
            "takes a gradient of rows that are public: name their file in data.public-path. One of clients' rows would "
            "cost privacy that no ledger enters; method.init = 'orthonormal' needs none.",
        )
        rule = "is only read with method.init = 'gradient' or 'lora-ga'; leave it out."
        require(gradient or path == "", "data.public-path", path, rule)
        rule = "its baselines would start otherwise than the run; set method.init = 'orthonormal', or leave them out."
        require(not (self.method.computed and self.eval.baselines), "eval.baselines", self.eval.baselines, rule)

    def _check_sites(self, dp: bool) -> None:
        """Refuse what deployed sites cannot be asked, or what is not known where nobody sees their rows."""
        sites, data = self.federation.sites, self.data
        require(
            (data.name == "sites") == (sites != ""),
            "data.name",
            data.name,
            "goes with federation.sites, the names of the deployed sites: set both, or neither.",
        )
        if not sites:
            return
        require(
            not self.method.start,
            "method.start",
            self.method.start,
            "is no folder of the sites; leave it out.",
        )
        rule = "is computed by a simulation's trainers only; set 'orthonormal'."
        require(not self.method.computed, "method.init", self.method.init, rule)
        require(data.dev_share == 0, "data.dev-share", data.dev_share, "is a share of rows that are at the sites.")
        require(
            not self.eval.baselines, "eval.baselines", self.eval.baselines, "needs all rows in one place; leave it out."
        )
        require(
            not dp or self.privacy.client_size > 0,
            "privacy.client-size",
            self.privacy.client_size,
            "must be given with deployed sites, whose sizes are not known here: a public number that fits them.",
        )

    def _check_scaffold(self, dp: bool) -> None:
        """Refuse what breaks SCAFFOLD's algebra: its variates are gradients only where a step is one."""
        train, why = self.train, "local.term = 'scaffold' takes a client's progress for a sum of gradients; set"
        for name, value, cure in (
            ("optimizer", train.optimizer, "sgd"),
            ("momentum", train.momentum, 0.0),
            ("weight-decay", train.weight_decay, 0.0),
            ("clip-norm", train.clip_norm, 0.0),
            ("b-rate-ratio", train.b_rate_ratio, 1.0),
            ("gradient", train.gradient, "plain"),
        ):
            require(value == cure, f"train.{name}", value, f"{why} train.{name} = {cure!r}.")
        require(
            not dp or self.local.option == 2,
            "local.option",
            self.local.option,
            "a gradient of all rows is not what differential privacy accounts for; use 2.",
        )

    def options(self, kind: type[OptionsT]) -> OptionsT:
        """Return a plug-in's section, such as ``config.options(MosOptions)``."""
        return next((one for one in self.plugin_options if isinstance(one, kind)), kind())

    def with_options(self, *changed: Options) -> Self:
        """Return the configuration with these sections in place of those of their kind."""
        kinds = {type(one) for one in changed}
        kept = [one for one in self.plugin_options if type(one) not in kinds]
        return replace(self, plugin_options=tuple(sorted([*kept, *changed], key=lambda one: one.section)))

    def to_flat(self) -> dict[str, Scalar]:
        """Return every key with its value, in the order of declaration."""
        flat: dict[str, Scalar] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            match item.name:
                case "plugin_options":
                    for options in value:
                        flat |= _flat(options.section, options)
                case "foreign":
                    flat |= dict(value)
                case _:
                    flat |= {item.name: value} if isinstance(value, Scalar) else _flat(item.name, value)
        return flat


def _flat(section: str, value: DataclassInstance) -> dict[str, Scalar]:
    return {dotted(section, item.name): getattr(value, item.name) for item in fields(value)}


@final
class Schema:
    """Every key that a configuration may have.

    Args:
        options: The options of plug-ins.

    Raises:
        ConfigError: They are not declared as they must be, or two have the same section.
    """

    def __init__(self, options: Iterable[type[Options]] = ()) -> None:
        hints = get_type_hints(Config)
        core = {item.name: hints[item.name] for item in fields(Config)}
        self.options: dict[str, type[Options]] = {}
        for kind in options:
            name = _declared(kind)
            taken = name in core or name in _SWEEP_TABLES
            if taken or self.options.setdefault(name, kind) is not kind:
                owner = "fedlora" if taken else self.options[name].__qualname__
                raise ConfigError(f"{kind.__qualname__}.section = {name!r}: is {owner}'s section; choose another name.")
        own = sorted(self.options.items())
        self.sections: dict[str, type[DataclassInstance]] = {"": Config}
        """Classes by the name of their section, in the order in which their keys are written."""
        for name, kind in core.items():
            if name == "plugin_options":
                self.sections |= dict(own)
            elif name not in _SCALARS and name != "foreign":
                self.sections[name] = kind
        self._keys = {key: (kind, item) for key, kind, item in self._leaves()}

    def _leaves(self) -> Iterator[tuple[str, type, Field[Any]]]:
        """Yield key, type and field of every scalar."""
        for section, cls in self.sections.items():
            hints = get_type_hints(cls)
            for item in fields(cls):
                if section or item.name in _SCALARS:
                    yield dotted(section, item.name), hints[item.name], item

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys."""
        return iter(self._keys)

    def defaults(self) -> dict[str, Scalar]:
        """Return every key with its default, as it is declared: an ``auto`` is one still."""
        defaults = {key: item.default for key, (_, item) in self._keys.items()}
        return {key: value for key, value in defaults.items() if isinstance(value, Scalar)}

    def read(self, flat: Mapping[str, Any], *, foreign: bool = False) -> Config:
        """Return the configuration that dotted keys say; keys left out keep their defaults.

        Args:
            flat: The keys.
            foreign: Keep keys of sections that are not in the schema as they are, for a reader that has no use for
                them: a report, whatever made the run, or a trainer, which knows no strategies.

        Raises:
            ConfigError: An unknown key, a value of the wrong type or out of range, or values that cannot work together.
        """
        grouped: dict[str, dict[str, Any]] = {}
        kept: list[tuple[str, Scalar]] = []
        for key, value in flat.items():
            section, _, name = key.rpartition(".")
            if key in self._keys:
                grouped.setdefault(section, {})[name.replace("-", "_")] = coerce(key, value, *self._keys[key])
            elif foreign and section not in self.sections:
                kept.append((key, value))
            else:
                known = sorted(self._keys)
                raise ConfigError(f"unknown key {key!r}.{closest(str(key), known)} Known: {', '.join(known)}.")
        core: dict[str, Any] = {
            name: kind(**grouped.get(name, {}))
            for name, kind in self.sections.items()
            if name and name not in self.options
        }
        options = tuple(kind(**grouped.get(name, {})) for name, kind in sorted(self.options.items()))
        return Config(**grouped.get("", {}), **core, plugin_options=options, foreign=tuple(kept))


_SWEEP_TABLES = ("grid", "tune")
_SCALARS = tuple(item.name for item in fields(Config) if isinstance(item.default, Scalar))


def _declared(kind: type[Options]) -> str:
    """Return the section of a plug-in's options, having checked how they are declared."""
    section = vars(kind).get("section", "")
    if not isinstance(section, str) or not section.replace("-", "").isalnum():
        raise ConfigError(f"{kind.__qualname__}.section = {section!r}: must be a word, the beginning of its keys.")
    own = {name for name, hint in vars(kind).get("__annotations__", {}).items() if "ClassVar" not in str(hint)}
    if own - {item.name for item in fields(kind)}:
        raise ConfigError(f"{kind.__qualname__} must be declared with @dataclass(frozen=True).")
    for name, hint in get_type_hints(kind).items():
        if name in own and hint not in (bool, int, float, str):
            raise ConfigError(f"{kind.__qualname__}.{name}: must be a bool, int, float or str, not {hint}.")
    try:
        kind()
    except TypeError as error:
        raise ConfigError(f"{kind.__qualname__}: every field needs a default ({error}).") from error
    return section
