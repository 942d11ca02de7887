"""A plan in words, for the terminal: who holds what, what is trained and sent, and what may surprise."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from fedlora.data.targets import spread_note
from fedlora.methods import METHODS, count_parameters, payload_bytes
from fedlora.reports.format import human_bytes
from fedlora.reports.tables import clients_table
from fedlora.roles import Role
from simulations.advice import verdict
from simulations.plan import Plan, in_turn
from simulations.rates import rate_line
from simulations.shard_plan import shards_lines
from strategies.server_optimizers import learning_rate


def show(plan: Plan, console: Console) -> None:
    """Print who holds what, what is trained and sent, and what that amounts to."""
    console.print(clients_table(list(plan.data.categories), plan.data.label_counts().tolist()))
    console.print(tensors_table(plan))
    for line in _lines(plan):
        console.print(line, markup=False)


def tensors_table(plan: Plan) -> RichTable:
    """Return a table of the kinds of tensors, with role and bytes of each."""
    config, dtype = plan.config, plan.config.engine.tensor_dtype
    table = RichTable(title=f"{config.strategy.name} / {config.method.name} on {config.model.name} ({plan.family})")
    for column in ("kind", "role", "tensors", "parameters", "bytes up", "bytes down"):
        table.add_column(column, justify="left" if column in ("kind", "role") else "right")
    sent_up = [plan.strategy.expected(number) for number in range(1, plan.strategy.period + 1)]
    for kind, roles in plan.strategy.roles_in_turn().items():
        own = {name: spec for name, spec in plan.specs.items() if spec.kind == kind}
        size = payload_bytes(own, dtype)
        up = max(payload_bytes({n: spec for n, spec in own.items() if n in sent}, dtype) for sent in sent_up)
        down = size if {Role.SHARED, Role.BROADCAST} & set(roles) else 0
        table.add_row(kind, in_turn(roles), str(len(own)), f"{count_parameters(own):,}", f"{up:,}", f"{down:,}")
    return table


def _lines(plan: Plan) -> list[str]:
    config, steps = plan.config, plan.steps()
    up, down, cached = plan.payloads.cycle()
    ups, downs = plan.traffic
    exact = {
        True: "exact",
        False: "not exact (docs/strategies.md says by how much)",
        None: "none: the server holds no whole update",
    }
    lines = [
        f"base model: {plan.num_parameters:,} parameters, {plan.num_layers} adapted layers, "
        f"{plan.trained_parameters():,} trained parameters a client",
        *plan.remarks,
        f"rounds: {config.rounds} of {plan.sampled} of {config.federation.num_clients} clients, in "
        f"{len(plan.packs)} pack(s) on {plan.trainers} trainer(s); {min(steps)} to {max(steps)} local steps of "
        f"{config.train.batch_size} examples",
        rate_line(config),
        *shards_lines(plan.shards, plan.packs),
        *([f"data: {plan.data.corpus.shape}"] if plan.data.corpus.shape else []),
        f"reported: {plan.measure.replace('_', ' ')}"
        + (" (each client on the rows it holds out)" if plan.strategy.has_personal else ""),
        f"bytes a client a round: {human_bytes(up)} up, {human_bytes(down)} down"
        + (f" ({human_bytes(cached)} if it kept what it was sent)" if cached != down else "")
        + (f", means over {len(plan.payloads.rounds)} rounds" if plan.strategy.period > 1 else ""),
        f"bytes of the whole run: {human_bytes(sum(ups))} up, {human_bytes(sum(downs))} down"
        + (" at most" if _at_most(plan) else ""),
    ]
    if plan.strategy.has_personal:
        lines.append("and down once more a round to every client that has trained, to evaluate its own tensors")
    lines.append(f"server mean of updates: {exact[plan.strategy.exact]}")
    lines += _terms(plan)
    lines += ["privacy: none"] if plan.privacy is None else [*plan.privacy.lines(), *verdict(plan.privacy)]
    lines += _remarks(plan)
    return lines


def _at_most(plan: Plan) -> bool:
    """Whether the run's bytes depend on numbers, and shapes give the most that they may be."""
    grows = plan.strategy.accumulates and not plan.strategy.exact
    prunes = plan.strategy.prunes and bool(plan.strategy.setting.ranks)
    return grows or prunes or plan.strategy.most_experts > 0


def _terms(plan: Plan) -> list[str]:
    """Return what is done beside the strategy's own rule: server optimizer, local terms, schedule, ranks."""
    config, lines = plan.config, []
    if config.server.optimizer != "none":
        lines.append(f"server optimizer: {config.server.optimizer}, learning rate {learning_rate(config.server):.4g}")
    first = plan.strategy.local(1)
    if first.proximal:
        lines.append(f"local term: FedProx, mu {first.proximal:g}")
    if first.penalty:
        lines.append(f"local term: HetLoRA's penalty on the last ranks, lambda {first.penalty:g}")
    if first.scaffold:
        lines.append(
            f"local term: SCAFFOLD, option {first.scaffold}; control variates double the bytes of what is shared"
        )
    shares = [plan.strategy.local(number).learning_rate for number in range(1, config.rounds + 1)]
    if len(set(shares)) > 1:
        lines.append(
            f"learning rate by round: {', '.join(f'{config.train.learning_rate * one:.4g}' for one in shares[:10])}"
            + (", ..." if len(shares) > 10 else "")
        )
    ranks = plan.strategy.setting.ranks
    if ranks:
        key, whole = METHODS[config.method.name].whole_rank(config)
        shown = ", ".join(map(str, ranks[:20])) + (", ..." if len(ranks) > 20 else "")
        lines.append(
            f"ranks by client{' in round 1, which fall where they are pruned' if plan.strategy.prunes else ''}: "
            f"{shown}; what is said of a client above is for {key} = {whole}"
        )
    drawn = [plan.strategy.rank(number) for number in range(1, min(config.rounds, 20) + 1)]
    if any(drawn):
        shown = ", ".join(map(str, drawn)) + (", ..." if config.rounds > len(drawn) else "")
        lines.append(f"ranks by round: {shown}; measured and exported with all {config.method.rank}")
    lines += _blocks(plan)
    if plan.strategy.most_experts:
        lines.append(
            f"experts: as many as round 1 shows clusters of clients, 2 to {plan.strategy.most_experts}; bytes down "
            "are for the most"
        )
    no_adapter = METHODS[config.method.name].no_adapter
    if no_adapter:
        lines.append(f"no adapter will be written: {no_adapter}")
    if plan.strategy.accumulates:
        downs = plan.traffic[1]
        lines.append(
            f"what is sent grows by round: {human_bytes(downs[0])} in round 1, "
            f"{human_bytes(downs[-1])} in the last at most"
        )
    return lines


def _blocks(plan: Plan) -> list[str]:
    """Return which blocks of the model are trained in turn, of a strategy that trains some in each round."""
    blocks = {spec.block: None for spec in plan.specs.values() if spec.block}
    turns = [set(plan.strategy.blocks(number)) for number in range(1, plan.config.rounds + 1)]
    if not all(turns):
        return []
    counts = [sum(block in turn for turn in turns) for block in blocks]
    line = (
        f"blocks: {len(turns[0])} of {len(blocks)} are trained in a round, each in {min(counts)} to {max(counts)} "
        f"of the {len(turns)} rounds"
    )
    never = [block for block, count in zip(blocks, counts, strict=True) if not count]
    if not never:
        return [line]
    return [line, f"note: with so few rounds {len(never)} blocks are never trained: {', '.join(never)}"]


def _remarks(plan: Plan) -> list[str]:
    """Return what is allowed but may surprise."""
    counts, remarks = plan.data.label_counts(), []
    lone = np.flatnonzero((counts > 0).sum(1) == 1).tolist() if counts.shape[1] > 1 else []
    if lone:
        shown = ", ".join(map(str, lone[:10])) + (", ..." if len(lone) > 10 else "")
        remarks.append(
            f"note: {len(lone)} of {len(counts)} clients hold rows of one class only ({shown}): alone they learn "
            "to answer it always, and a personal head stays useless for the others"
        )
    if plan.config.task == "regression" and len(plan.data.corpus.train):
        note = spread_note([value for (value,) in plan.data.corpus.train.numbers])
        remarks += [note] if note else []
    declared = plan.config.privacy.client_size
    mean = np.mean([len(plan.data.training_rows(client)) for client in range(len(counts))])
    if plan.privacy is not None and not declared / 2 <= mean <= 2 * declared:
        remarks.append(
            f"note: clients hold {mean:.0f} training rows on average; sample rate, steps, denominators and delta "
            f"go by privacy.client-size = {declared}"
        )
    return remarks
