"""Writes the tables of ``docs/strategies.md`` (``make tables``): what each strategy sends, and how exact it is.

Everything is computed from the strategies themselves and from the shapes of models on the ``meta`` device; nothing is
trained, no weights are loaded, and the head, which ``method.head`` decides about, is not counted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.engine.packed import OWN_RANKS
from fedlora.config import Config, MethodConfig, ModelConfig
from fedlora.exchange import ClientReport, Update
from fedlora.methods import METHODS as REGISTERED
from fedlora.methods import (
    FlyLoraOptions,
    Layer,
    Method,
    MosOptions,
    TopRanks,
    WeightDecomposed,
    as_low_rank,
    build_method,
    count_parameters,
    initial_tensors,
)
from fedlora.models import inspect, inspect_by_name
from fedlora.plugins import methods_of
from fedlora.reduce import REDUCTIONS
from fedlora.roles import UP, Role
from fedlora.seeded import Seeded
from fedlora.server import Payloads
from fedlora.strategy import Setting, Strategy
from fedlora.tasks import TASKS
from strategies import STRATEGIES
from tools.markdown import rewrite

Arrays = dict[str, NDArray[np.floating]]
_DTYPE = "float32"
_CLIENTS = 5

MODELS = ("MiniLM q,v", "RoBERTa-large q,v", "RoBERTa-large all", "Llama-2-7B q,v", "Llama-2-7B all")
_LORA = Config(method=MethodConfig("lora", rank=8))
_MOS_1 = Config(method=MethodConfig("mos", rank=6)).with_options(MosOptions(budget=1, private=0))
_FLY = Config(method=MethodConfig("flylora", rank=32)).with_options(FlyLoraOptions(active=8))
_RANK = 8


def _at_rank(name: str, rank: int) -> tuple[str, Config]:
    return f"`{name}`, r = {rank}", Config(method=MethodConfig(name, rank=rank))


# Every method at rank 8 or the one that it is meant for, LoRA-SB at both; MoS, whose parameters are those of LoRA of
# its budget, also at a budget of 1.
METHODS: Mapping[str, Sequence[tuple[str, Config]]] = {
    **{name: [_at_rank(name, OWN_RANKS.get(name, _RANK))] for name in REGISTERED},
    "lora-sb": [_at_rank("lora-sb", rank) for rank in (_RANK, OWN_RANKS["lora-sb"])],
    "uni-lora": [("`uni-lora`, D = 256", Config(method=MethodConfig("uni-lora", rank=8)))],
    "block-lora": [("`block-lora`, r = 8, n = 8", Config(method=MethodConfig("block-lora", rank=8)))],
    "flylora": [("`flylora`, r = 32, k = 8", _FLY)],
    "mos": [("`mos`, e = 4", Config(method=MethodConfig("mos", rank=8))), ("`mos`, e = 1", _MOS_1)],
}


@functools.cache
def layers_of(model: str) -> tuple[Layer, ...]:
    """Return the adapted layers of a model of the tables."""
    name, targets = model.split(" ")
    if name == "MiniLM":
        return inspect_by_name(ModelConfig("minilm"), TASKS["classification"], 2, "query,value").adapted
    with torch.device("meta"):
        if name == "RoBERTa-large":
            config = transformers.RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            )
            skeleton = transformers.AutoModelForSequenceClassification.from_config(config)
            return inspect(skeleton, "query,value" if targets == "q,v" else "all-linear", has_head=True).adapted
        skeleton = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig())
        return inspect(skeleton, "q_proj,v_proj" if targets == "q,v" else "all-linear", has_head=False).adapted


def strategy_on(name: str, method: Method) -> Strategy:
    """Return a strategy on a method, with all else at its default."""
    strategy: Strategy = STRATEGIES[name](Setting(method.specs()))
    return strategy


def bytes_up(name: str, config: Config, model: str) -> float:
    """Return the bytes that a client sends in a round, a mean over a cycle."""
    return Payloads(strategy_on(name, build_method(config, layers_of(model), [])), _DTYPE).cycle()[0]


def error_of_mean(strategy: Strategy, method: Method) -> float:
    """Return how far the server's update is from the mean of the clients', relative, over all layers and rounds.

    Five clients of equal weight return tensors half of which they have in common: each is the sum of a part drawn for
    all and one drawn for itself, both uniform on [-1, 1).
    """
    draws = Seeded(0)
    specs = method.specs()

    def drawn(whose: str, number: int, names: Sequence[str]) -> Arrays:
        return {name: draws.uniform(whose, number, name, shape=specs[name].shape, bound=1.0) for name in names}

    held: Arrays = dict(initial_tensors(specs, draws))
    state = strategy.initial(held)
    off = whole = 0.0
    for number in range(1, strategy.period + 1):
        sent, expected = strategy.sent(number), strategy.expected(number)
        held |= drawn("server", number, list(sent))
        state = replace(state, tensors={**state.tensors, **{name: held[name] for name in sent}})
        common = drawn("all", number, list(expected))
        total, clients = REDUCTIONS[strategy.reduction(number)](), []
        for client in range(_CLIENTS):
            own = drawn(f"client {client}", number, list(expected))
            clients.append({name: common[name] + own[name] for name in expected})
            total.add(Update(ClientReport(client), clients[-1]), 1)
        state = strategy.apply(state, total.reduced(), number)
        each = [updates(method, {**held, **client}) for client in clients]
        for layer, update in updates(method, {**held, **state.tensors}).items():
            target = np.mean([one[layer] for one in each], axis=0)
            off += float(np.square(update - target).sum())
            whole += float(np.square(target).sum())
    return float(np.sqrt(off / whole))


def updates(method: Method, tensors: Mapping[str, NDArray[np.floating]]) -> dict[str, NDArray[np.float64]]:
    """Return Delta W of each of a method's layers, [d_out, d_in], in float64, with what is stacked beside it.

    Of a weight-decomposed layer it is that of a base weight which is drawn as clients' tensors are. Where each token
    uses some ranks: what is made of tokens with one feature that is not zero.
    """
    named = {name: torch.tensor(np.asarray(value)).double() for name, value in tensors.items()}
    found = {}
    for layer, factor in method.factors(named).items():
        added = as_low_rank(factor)
        if isinstance(factor, TopRanks):
            found[layer] = factor.of(torch.eye(factor.A.shape[-1], dtype=torch.float64)).mT.numpy()
        if added is not None:
            update = added.scaled_b() @ added.A
            if isinstance(factor, WeightDecomposed):
                base = torch.from_numpy(Seeded(0).uniform("base", layer, shape=tuple(update.shape), bound=1.0))
                m = base.norm(dim=1) + factor.magnitude
                update = (m / (base + update).norm(dim=1))[:, None] * (base + update) - base
            if f"{layer}.residual_A" in named:
                update = update + added.scale * named[f"{layer}.residual_B"] @ named[f"{layer}.residual_A"]
            found[layer] = update.numpy()
    return found


def roles_table() -> list[str]:
    """Return the table of roles and exactness, as Markdown lines."""
    lines = [
        "| strategy | method | trained and sent | trained and kept | fixed | rounds in turn | server mean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    layers = layers_of("MiniLM q,v")
    for name in STRATEGIES:
        for kind in methods_of(name):
            method = build_method(METHODS[kind][0][1], layers, [])
            strategy = strategy_on(name, method)
            in_turn = strategy.roles_in_turn()
            by_role = {role: [kind for kind, roles in in_turn.items() if role in roles] for role in Role}
            sent = [kind for kind, roles in in_turn.items() if set(UP) & set(roles)]
            turns = [_joined([k for k in sent if in_turn[k][number] in UP]) for number in range(strategy.period)]
            if strategy.exact is None:
                mean = "none: no whole update at the server"
            else:
                off = error_of_mean(strategy, method)
                mean = "exact" if strategy.exact else f"off by {off:.2f}"
                assert (off < 1e-12) == strategy.exact, f"{name} is off by {off}"
            sent_only = [k for k in by_role[Role.BROADCAST] if k not in sent]
            kept = by_role[Role.PERSONAL]
            never = [k for k in by_role[Role.FROZEN] if k not in (*sent, *kept)]
            fixed = ", ".join([*never, *(f"{k} (by the server)" for k in sent_only)])
            lines.append(
                f"| `{name}` | `{kind}` | {_joined(sent)} | {_joined(kept)} | "
                f"{fixed or '-'} | {' → '.join(turns) if len(set(turns)) > 1 else '-'} | {mean} |"
            )
    return lines


def _joined(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "-"


def _refused(name: str, config: Config) -> bool:
    try:
        STRATEGIES[name].check(config)
    except ValueError:
        return True
    return False


def bytes_table() -> list[str]:
    """Return the table of bytes up, and their share of ``fedavg`` on LoRA, as Markdown lines."""
    lines = [
        f"| strategy | method | {' | '.join(MODELS)} |",
        f"| --- | --- |{' ---: |' * len(MODELS)}",
    ]
    whole = {model: bytes_up("fedavg", _LORA, model) for model in MODELS}
    for name in STRATEGIES:
        for kind in methods_of(name):
            for label, config in METHODS[kind]:
                if name == "local" or _refused(name, config):  # the former sends nothing
                    continue
                ups = {m: bytes_up(name, config, m) for m in MODELS}
                cells = [f"{_size(up)} ({_share(up / whole[model])})" for model, up in ups.items()]
                lines.append(f"| `{name}` | {label} | {' | '.join(cells)} |")
    return lines


def down_table() -> list[str]:
    """Return the table of bytes down on RoBERTa-large, for clients that cache and clients that do not."""
    lines = [
        "| strategy | method | up | down | down, if kept | trained parameters |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    layers = layers_of("RoBERTa-large q,v")
    for name in STRATEGIES:
        for kind in methods_of(name):
            label, config = METHODS[kind][0]
            strategy = strategy_on(name, build_method(config, layers, []))
            trained = {n: s for n, s in strategy.setting.specs.items() if s.kind in strategy.trained_kinds}
            up, down, cached = map(_size, Payloads(strategy, _DTYPE).cycle())
            sizes = f"{up} | grows | grows" if strategy.accumulates else f"{up} | {down} | {cached}"
            lines.append(f"| `{name}` | {label} | {sizes} | {count_parameters(trained):,} |")
    return lines


def _size(count: float) -> str:
    unit, scale = ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / scale:.2f} {unit}" if count else "0"


def _share(share: float) -> str:
    return f"{share:.2g}" if share < 0.1 else f"{share:.3g}"


TABLES = {"roles": roles_table, "bytes": bytes_table, "down": down_table}


def main(root: str) -> None:
    """Rewrite the tables of the project in the folder ``root``."""
    rewrite(Path(root) / "docs" / "strategies.md", TABLES)


if __name__ == "__main__":
    main(sys.argv[1])
