"""The end of a run: what is measured once, the exported adapters, ``result.json``, the report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedlora.methods import METHODS
from fedlora.metrics import TRAFFIC
from fedlora.reports.card import model_card
from fedlora.reports.run import Run as Report
from fedlora.reports.summary import write_report
from fedlora.reports.tables import metrics_table, outcome_table
from fedlora.roles import Role
from fedlora.runs.ranks import effective_ranks, read_strengths, zero_share
from fedlora.server.evaluator import metrics
from fedlora.shapes import first_ranks
from fedlora.storage import StorageError
from simulations.generated import generated
from simulations.run import Run
from simulations.scores import score, summarise
from simulations.trainers import describe

_ADAPTERS = 100  # of clients' own adapters that are exported, at most


def finish(run: Run, baselines: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
    """Write what a run came to, and return it.

    Args:
        run: The run, after its last round.
        baselines: Runs what the curve is compared with (``eval.baselines``).
    """
    plan, console, last = run.plan, run.parts.console, run.lines[-1]
    if last["round"] < plan.config.rounds:
        console.print(f"stopped after round {last['round']} of {plan.config.rounds}: privacy budgets are spent")
    outcome = _measured(run) | generated(run)
    _export(run, outcome)
    strengths = read_strengths(run.parts.folder.path)
    ranks = effective_ranks(strengths)
    if strengths:
        outcome |= {
            "effective_rank": float(ranks.mean()),
            "effective_rank_least": float(ranks.min()),
            "effective_rank_most": float(ranks.max()),
            "zero_components": zero_share(strengths),
        }
    outcome["trained_parameters"] = plan.trained_parameters()
    if plan.config.eval.baselines:
        outcome |= baselines()
    outcome |= {
        "rounds": last["round"],
        **{name: int(np.sum([line[name] for line in run.lines])) for name in TRAFFIC},
        **_to_target(run),
        "seconds": time.monotonic() - run.started,
    }
    run.parts.folder.write_json("result.json", outcome)
    if console.quiet:  # a cell of a sweep, whose figures `fedlora report` draws
        return outcome
    report = Report.read(run.parts.folder.path)
    try:
        write_report(report)
    except StorageError as error:  # the run is finished all the same
        console.print(f"note: no plots and summary: {error}", markup=False)
    console.print(metrics_table(report))
    console.print(outcome_table(report))
    if plan.privacy is not None:
        console.print(f"privacy: {run.privacy.record['guarantee']}", markup=False)
    console.print(f"run folder: {run.parts.folder.path}", markup=False)
    console.print("next: " + "\n      ".join(map(shlex.join, _next(run))), markup=False, emoji=False)
    return outcome


def _measured(run: Run) -> dict[str, Any]:
    """Return the last round's metrics, and what is measured once."""
    plan, last, task = run.plan, run.lines[-1], run.task
    outcome: dict[str, Any] = {"head": last["head"], **run.before}
    own = ("test_", "dev_", "personal_")
    outcome |= {name: value for name, value in last.items() if name.startswith(own) and value is not None}
    splits = plan.data.corpus.splits
    if plan.measured == "dev" and plan.config.eval.test:
        final = metrics(run.evaluator, task, run.tensors, "test", len(splits["test"]))
        outcome |= {f"test_{name}": value for name, value in final.items()}
    if plan.privacy is not None and plan.strategy.has_personal and not run.sums:
        run.sums = run.evaluate_clients(last["round"])  # of a run that was continued after its last round
    outcome |= _by_rank(run)
    scores = _scores(run)
    if scores:
        run.parts.folder.write_lines("scores.jsonl", scores)
        outcome |= summarise(scores, task.measure.name, task.measure.higher_is_better)
    if task.measure.name == "accuracy":
        outcome["majority_share"] = plan.data.corpus.majority_share(splits.get("test") or splits["dev"])
    if plan.privacy is not None:
        privacy = plan.config.privacy
        outcome |= run.privacy.spent()
        outcome |= {"delta": privacy.delta, "noise_multiplier": privacy.noise_multiplier}
        outcome["guarantee"] = run.privacy.record["guarantee"]
    return outcome


def _by_rank(run: Run) -> dict[str, float]:
    """Return the measure of the model cut to smaller ranks that rounds may train, of those the powers of two."""
    plan, strategy = run.plan, run.plan.strategy
    if plan.measured == "personal":
        return {}
    drawn = {rank for number in range(1, strategy.period + 1) if (rank := strategy.rank(number)) is not None}
    ranks = sorted(rank for rank in drawn if rank < plan.config.method.rank and rank & (rank - 1) == 0)
    rows, name = len(plan.data.corpus.splits[plan.measured]), run.task.measure.name
    cut = {rank: first_ranks(run.tensors, plan.specs, rank) for rank in ranks}
    return {
        f"{plan.measure}_rank_{rank}": metrics(run.evaluator, run.task, tensors, plan.measured, rows)[name]
        for rank, tensors in cut.items()
    }


def _scores(run: Run) -> list[dict[str, Any]]:
    """Return each client's metrics on the rows that it holds out, under the model that it ends with."""
    if run.plan.strategy.has_personal:
        return [score(run.task, client, run.sums[client]) for client in sorted(run.sums)]
    held = [(client, rows) for client, rows in enumerate(run.plan.data.holdout) if len(rows)]
    if not held:
        return []
    facts = run.evaluator.facts(run.tensors, "train", np.concatenate([rows for _, rows in held]).tolist())
    bounds = np.cumsum([0, *(len(rows) for _, rows in held)])
    return [
        score(
            run.task,
            client,
            {"examples": len(rows)}
            | run.task.sums({name: values[bounds[at] : bounds[at + 1]] for name, values in facts.items()}),
        )
        for at, (client, rows) in enumerate(held)
    ]


def _to_target(run: Run) -> dict[str, int | None]:
    """Return the rounds and bytes until the measure first reached ``eval.target``; None where it never did."""
    target = run.plan.config.eval.target
    if not target:
        return {}
    sign = 1 if run.task.measure.higher_is_better else -1
    measured = {line["round"]: line[run.plan.measure] for line in run.lines}
    reached = [n for n, value in measured.items() if value is not None and sign * value >= sign * target]
    if not reached:
        return dict.fromkeys(("rounds_to_target", *(f"{name}_to_target" for name in TRAFFIC)))
    until = [line for line in run.lines if line["round"] <= reached[0]]
    return {
        "rounds_to_target": reached[0],
        **{f"{name}_to_target": sum(line[name] for line in until) for name in TRAFFIC},
    }


def _export(run: Run, outcome: Mapping[str, Any]) -> None:
    """Write the adapter; where clients keep factors of their own, an adapter for each of them."""
    plan, folder = run.plan, run.parts.folder
    folder.write_json("trainers.json", describe(run.parts.evaluator.pool))
    no_adapter = METHODS[plan.config.method.name].no_adapter
    if no_adapter:
        run.parts.console.print(f"no adapter is written: {no_adapter}")
        return
    number = plan.config.rounds + 1
    roles = plan.strategy.all_roles(number)
    own = any(role is Role.PERSONAL for kind, role in roles.items() if kind != "head")
    clients = sorted(run.flower.state.clients.trained)[:_ADAPTERS] if own else []
    exported = run.evaluator.export(run.tensors, roles, number, clients)
    whose: list[tuple[int, ...]] = [(client,) for client in clients] or [()]
    for one, files in zip(whose, exported, strict=True):
        name = f"adapters/client-{one[0]}" if one else "adapter"
        last, corpus = run.lines[-1]["round"], plan.data.corpus
        texts = corpus.text_names(plan.config.data.text_column)
        card = model_card(plan.config, corpus.classes, outcome, roles, run.privacy.record, last, one, texts)
        for file, content in {**files, "README.md": card.encode()}.items():
            folder.write_bytes(f"{name}/{file}", content)


def _next(run: Run) -> list[list[str]]:
    """Return commands that a user may want to type now, word by word."""
    config, folder = run.plan.config, run.parts.folder.path
    file = str(folder / "config.toml")
    commands = [["fedlora", "report", str(folder)]]
    if run.plan.privacy is not None:  # another strategy would need its privacy keys, more rounds another budget
        return [*commands, ["fedlora", "audit", "-c", file]]
    other = "fedavg" if config.strategy.name == "ffa-lora" else "ffa-lora"
    commands.append(["fedlora", "run", "-c", f'strategy.name="{other}"'])
    if config.train.round_schedule == "constant" and not run.plan.strategy.laid_out(config):
        more = f"run.resume=true rounds={2 * config.rounds}"
        commands.append(["fedlora", "run", "-c", file, "-c", more])
    return commands
