"""What a run's ``privacy.json`` says: what left each client, under which guarantee, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config import Config
from fedlora.config.data_section import column_names
from fedlora.metrics import OUTSIDE
from fedlora.privacy import Entry, Mechanism, certifier, epsilon, merged, statement
from fedlora.privacy.mechanism import ADVERSARIES, NEIGHBOURS, SAMPLING
from fedlora.privacy.randomness import describe
from fedlora.roles import Role
from fedlora.tasks import TASKS

FILE = "privacy.json"
_COVERED = "differential privacy, as stated here"
_USE = "{steps} steps at noise multiplier {noise_multiplier:.4g}, sample rate {sample_rate:.4g}"
_MANY = 100  # clients that a table shows
_PUBLIC = "independent of rows: it follows from the schedule and the configuration, privacy.client-size included"


def without_privacy(roles: Mapping[str, Sequence[Role]]) -> dict[str, Any]:
    """Return the record of a run without DP.

    Args:
        roles: Roles of each kind of tensor, in turn.
    """
    sent = [f"trained tensors of kind {', '.join(_shared(roles))}", "number of training rows", "mean training loss"]
    if any(Role.PERSONAL in turns for turns in roles.values()):
        sent.append("sums of metrics over the rows that a client holds out")
    return {
        "mode": "none",
        "guarantee": "none: what clients send is not protected by differential privacy",
        "released": [{"what": what, "guarantee": "none"} for what in sent],
    }


def privacy_record(
    config: Config, ledgers: Mapping[int, Sequence[Entry] | str], device: str, roles: Mapping[str, Sequence[Role]]
) -> dict[str, Any]:
    """Return the record of a run under DP.

    Args:
        config: The configuration, with all ``privacy`` keys given.
        ledgers: Every client's ledger, or why it cannot be trusted.
        device: Where clients compute.
        roles: Roles of each kind of tensor, in turn.
    """
    privacy, mechanism = config.privacy, Mechanism.of(config)
    clients = [client_record(config, client, entries) for client, entries in sorted(ledgers.items())]
    spent = max((one["epsilon"] for one in clients), default=0.0)
    rng = describe(privacy.seed, device)
    baselines = "" if not config.eval.baselines else " So are the runs in baselines/, which train without privacy."
    start = " What the adapter that it starts from was trained on is not covered." if config.method.start else ""
    kinds = ", ".join(_shared(roles))
    return {
        "mode": privacy.mode,
        "guarantee": f"{statement(config, spent)} Randomness: {rng}.{start}",
        "private": privacy.seed == 0 and math.isfinite(spent),
        "unit": privacy.unit,
        "trust": privacy.trust,
        "adversary": ADVERSARIES[privacy.trust],
        "neighbours": NEIGHBOURS,
        "sampling": SAMPLING,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "rng": rng,
        "noise_multiplier": mechanism.noise_multiplier,
        "max_grad_norm": mechanism.max_grad_norm,
        "sample_rate": mechanism.sample_rate,
        "client_size": privacy.client_size,
        "steps_per_round": mechanism.steps,
        "released": [
            {"what": f"trained tensors of kind {kinds}, each round, as they are after it", "guarantee": _COVERED},
            *_class_names(config),
            {"what": "number of local steps", "guarantee": _PUBLIC},
            {"what": "hash of the last ledger entry", "guarantee": _PUBLIC},
            {"what": "that a client takes part, or that its budget is spent", "guarantee": _PUBLIC},
            {"what": "that tensors are not finite, noise included", "guarantee": _COVERED},
            {
                "what": "that training failed or the ledger cannot be trusted, without the reason; when it ended",
                "guarantee": "none: in case of a fault, and by the clock",
            },
        ],
        "not_released": [
            "number of rows, losses, accuracies, clipped fraction, signal to noise: in "
            "sites/client-*/diagnostics.jsonl, for the site alone. What this simulation's researcher sees of "
            "clients' own rows (partition.json, metrics of clients, scores, the share of the commonest class, the "
            f"tokens of a row that an estimate rests on, errors before the first round) is {OUTSIDE}.{baselines}",
        ],
        "clients": clients,
    }


def _class_names(config: Config) -> list[dict[str, str]]:
    if not (TASKS[config.task].has_head and TASKS[config.task].has_classes):
        return []
    columns = column_names(config.data.label_column)
    if config.data.classes or config.data.name == "docstrings" or len(columns) > 1:
        guarantee = "independent of rows: they are known beforehand"
    else:
        guarantee = "none: they are the labels of the training rows, taken as public; declare them in data.classes"
    return [{"what": "names and number of the classes", "guarantee": guarantee}]


def client_record(config: Config, client: int, entries: Sequence[Entry] | str) -> dict[str, Any]:
    """Return what a client's rows were used for, and what that comes to.

    Args:
        config: The configuration.
        client: The client.
        entries: Its ledger, or why it cannot be trusted: what was spent is not known then, and counts as infinite.
    """
    privacy, budget = config.privacy, config.privacy.epsilon or None
    if isinstance(entries, str):
        unknown: dict[str, Any] = {"rounds": None, "ledger": [], "epsilon": math.inf, "epsilon_rdp": math.inf}
        return {"client": client, **unknown, "budget": budget, "remaining": 0.0 if budget else None, "error": entries}
    uses = merged(entry.use for entry in entries)
    certified = epsilon(uses, target_delta=privacy.delta, accountant=certifier(config))
    return {
        "client": client,
        "rounds": len({entry.round for entry in entries}),
        "ledger": [use._asdict() for use in uses],
        "epsilon": certified,
        "epsilon_rdp": epsilon(uses, target_delta=privacy.delta, accountant="rdp"),
        "budget": budget,
        "remaining": max(0.0, privacy.epsilon - certified) if budget else None,
    }


def spent(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the most and the least epsilon that a client of a record has spent; empty without DP."""
    values = [one["epsilon"] for one in record.get("clients", ())]
    return {"epsilon": max(values), "epsilon_least": min(values)} if values else {}


def format_epsilon(value: float | None) -> str:
    """Return an epsilon of a record as text; JSON holds null where it is infinite."""
    return "infinite" if value is None or math.isinf(value) else f"{value:.4f}"


def spending_table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a table with what each client has spent, of the first hundred."""
    columns = ["client", "rounds", "ledger", "epsilon", "epsilon by RDP", "budget", "remaining"]
    rows = [
        [
            str(one["client"]),
            "?" if one["rounds"] is None else str(one["rounds"]),
            one.get("error") or "; ".join(_USE.format(**use) for use in one["ledger"]) or "nothing",
            format_epsilon(one["epsilon"]),
            format_epsilon(one["epsilon_rdp"]),
            *("none" if one["budget"] is None else f"{one[key]:.4f}" for key in ("budget", "remaining")),
        ]
        for one in record["clients"][:_MANY]
    ]
    return columns, rows


def markdown(record: Mapping[str, Any]) -> list[str]:
    """Return a privacy record as lines of Markdown: what left the clients, and what each of them has spent."""
    lines = [f"- {one['what']}: {one['guarantee']}" for one in record.get("released", ())]
    lines = ["What left each client, and under which guarantee:", "", *lines, ""] if lines else []
    lines += [f"Not sent: {what}" for what in record.get("not_released", ())]
    if "clients" in record:
        columns, rows = spending_table(record)
        lines += ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        if len(record["clients"]) > len(rows):
            lines += ["", f"The other {len(record['clients']) - len(rows)} clients are in {FILE}."]
    return lines


def _shared(roles: Mapping[str, Sequence[Role]]) -> list[str]:
    return [kind for kind, turns in roles.items() if Role.SHARED in turns] or ["none"]
