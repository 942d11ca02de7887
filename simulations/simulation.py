"""One run: what happens around a strategy's rounds, from the plan to the finished folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray
from rich.console import Console

from clients.accounts import Accounts
from clients.ray_site import TrainerPool, split_packs
from clients.site import Description, SiteLimits
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.exchange import Instruction
from fedlora.fingerprint import CLIENT_PACKAGES, code_fingerprint
from fedlora.methods import initial_tensors
from fedlora.privacy import Entry, LedgerError
from fedlora.roles import Role
from fedlora.runs.card import model_card
from fedlora.runs.folder import RunFolder, environment, read_lines
from fedlora.runs.privacy import FILE as PRIVACY_FILE
from fedlora.runs.privacy import OUTSIDE, privacy_record, told_epsilon, without_privacy
from fedlora.runs.ranks import effective_ranks, read_strengths, zero_share
from fedlora.runs.report import Run, human_bytes, human_time, metrics_table, outcome_table, plot_partition, write_report
from fedlora.seeded import Seeded
from fedlora.tasks import TASKS
from fedlora.wire import from_named_arrays, named_arrays
from simulations.baselines import Federated, run_baselines
from simulations.plan import Plan
from simulations.scores import summarise, sums_of
from simulations.setup import build_strategy

if TYPE_CHECKING:
    from simulations.session import Session

_ADAPTERS = 100  # of clients' own adapters that are exported, at most


class Simulation:
    """One run.

    Args:
        plan: What it is going to do.
        folder: Its folder.
        pool: The trainers, at work on it.
        description: What a trainer said of itself.
        console: Where progress goes.
        session: Runs what it is compared with.
        started: When it started, by ``time.monotonic``.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        pool: TrainerPool,
        description: Description,
        console: Console,
        session: Session,
        started: float,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.data = plan.data
        self.strategy = plan.strategy
        self.task = TASKS[plan.config.task]
        self.folder = folder
        self.pool = pool
        self.description = description
        self.console = console
        self.session = session
        self.started = started
        self.round_started = started
        self.metrics: list[dict[str, Any]] = []
        self.before: dict[str, float] = {}
        self.privacy: dict[str, Any] = {}

    def run(self, grid: Grid) -> dict[str, Any]:
        """Run the rounds, write the run's files, and return the outcome."""
        tensors, completed = self._start()
        self.round_started = time.monotonic()
        try:
            result = self.strategy.start(
                grid,
                named_arrays(tensors),
                num_rounds=self.config.rounds,
                timeout=self.config.federation.timeout,
                evaluate_fn=self._evaluate,
                on_round=self._on_round,
                completed=completed,
            )
        finally:
            self._write_privacy()  # what a round that did not end has cost, too
        assert result.arrays is not None, "a run has a result"
        return self._finish(from_named_arrays(result.arrays))

    # -- before the rounds --------------------------------------------------------------------------------

    def _start(self) -> tuple[dict[str, NDArray[np.floating]], int]:
        """Show and write what is known, and return the tensors to start from with the rounds behind them."""
        checkpoint = self.folder.read_checkpoint({"base": self.description.digest}) if self.config.run.resume else None
        seeded = initial_tensors(self.description.specs, Seeded(self.config.seed), self.config.engine.tensor_dtype)
        tensors = {name: np.asarray(value) for name, value in self.strategy.initial(seeded).items()}
        if checkpoint is not None:
            tensors = checkpoint.tensors
            self.strategy.have_trained = set(checkpoint.state["have_trained"])
            self.strategy.knows = dict(checkpoint.state["knows"])
            self.strategy.ledger_heads = dict(checkpoint.state["ledger_heads"])
            self.strategy.spent = set(checkpoint.state["spent"])
            self.metrics = read_lines(self.folder.path / "metrics.jsonl")
            self.before = checkpoint.state["before"]
            self.started -= checkpoint.state["seconds"]
        completed = checkpoint.round if checkpoint is not None else 0
        self.plan.show(self.console)
        if completed:
            self.console.print(f"resumed after round {completed}")
            if checkpoint is not None and checkpoint.state["packing"] != self._packing():
                self.console.print(
                    f"note: packs were made with {checkpoint.state['packing']} and are now with {self._packing()}: the "
                    "rest agrees with an undisturbed run within rounding, not to the bit"
                )
        self._write_start()
        if not self.console.quiet and completed < self.config.rounds:
            self._estimate(tensors, completed)
        return tensors, completed

    def _packing(self) -> dict[str, int]:
        """What decides, beside the configuration, which clients are packed together."""
        return {"nodes": self.plan.nodes, "trainers": len(self.pool)}

    def _write_start(self) -> None:
        counts = self.data.label_counts().tolist()
        names = list(self.data.names)
        classes = list(self.data.corpus.classes)
        self.folder.write_json("partition.json", {"classes": classes, "counts": counts, "names": names})
        self.folder.write_json("plan.json", self.plan.record())
        self._write_privacy()
        plot_partition(Run.read(self.folder.path))
        self.folder.write_json("environment.json", environment(code_fingerprint((*CLIENT_PACKAGES, "strategies"))[0]))
        self.console.print(
            f"{len(self.pool)} trainer(s) of {self.description.threads} thread(s) on {self.description.device}"
        )

    def _write_privacy(self) -> None:
        """Write ``privacy.json``, under DP from the clients' ledgers as they are now."""
        roles = self.strategy.roles_in_turn()
        if self.plan.privacy is None:
            self.privacy = without_privacy(roles)
        else:
            ledgers: dict[int, Sequence[Entry] | str] = {}
            for client in range(len(self.data.clients)):
                try:
                    ledgers[client] = self.accounts.ledger(client).check_holds(
                        self.strategy.ledger_heads.get(client, "")
                    )
                except LedgerError as error:
                    ledgers[client] = str(error)
            self.privacy = privacy_record(self.config, ledgers, self.description.device, roles)
        self.folder.write_json(PRIVACY_FILE, self.privacy)

    def _spent(self) -> dict[str, float]:
        """Return the most and the least epsilon that a client has spent; empty without DP."""
        spent = [one["epsilon"] for one in self.privacy.get("clients", ())]
        return {"epsilon": max(spent), "epsilon_least": min(spent)} if spent else {}

    @property
    def accounts(self) -> Accounts:
        """The clients' privacy accounts, which are in a simulation's folder."""
        return Accounts(SiteLimits(str(self.folder.path / "sites")), self.config)

    def _estimate(self, tensors: dict[str, NDArray[np.floating]], completed: int) -> None:
        """Print how long the rounds will take, by a short probe."""
        sampled = self.strategy.sample(completed + 1)
        pack = split_packs(sampled, self.config.engine.pack, len(self.pool))[0]
        request = Instruction(completed + 1, pack, self.strategy.all_roles(completed + 1), tensors)
        (speed,) = self.pool.results(lambda worker, request: worker.probe(request), [request])
        rounds = self.config.rounds - completed
        examples = self.plan.examples(rounds)
        train_s = examples * speed.row_tokens * speed.train_s
        measured = rounds * speed.measured_tokens
        if self.strategy.has_personal:
            measured = int(rounds * sum(map(len, self.data.holdout)) * speed.row_tokens)
        total_s = (train_s + measured * speed.evaluate_s) / len(self.pool)
        self.console.print(
            f"estimate from a probe: {human_time(total_s)} for {rounds} round(s), at {1 / speed.train_s:,.0f} tokens/s "
            f"in training and {1 / speed.evaluate_s:,.0f} in evaluation on each trainer"
        )

    # -- rounds -------------------------------------------------------------------------------------------

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate the server's tensors on the rows that a round is measured on, all trainers side by side."""
        if self.strategy.has_personal or (server_round == 0 and self.task.has_head):
            return None  # an untrained head knows nothing; a language model does, before any round
        metrics = self._metrics(from_named_arrays(arrays), self.plan.measured)
        if server_round == 0:
            self.before = {f"before_{name}": value for name, value in metrics.items()}
            told = f"{self.plan.measure.replace('_', ' ')} {metrics[self.task.measure.name]:.4f}"
            self.console.print(f"before training: {told}")
        return MetricRecord({f"{self.plan.measured}_{name}": value for name, value in metrics.items()})

    def _facts(
        self, tensors: dict[str, NDArray[np.floating]], split: str, rows: Sequence[int]
    ) -> dict[str, NDArray[np.float64]]:
        """Return what the task tells of each of these rows under the server's tensors, [rows] each."""
        shares = [np.arange(first, len(rows), len(self.pool)) for first in range(len(self.pool))]
        shares = [share for share in shares if len(share)]
        parts = self.pool.results(
            lambda worker, item: worker.evaluate(*item),
            [(tensors, split, [rows[int(at)] for at in share]) for share in shares],
        )
        told = {name: np.zeros(len(rows)) for name in parts[0]}
        for share, part in zip(shares, parts, strict=True):
            for name, values in part.items():
                told[name][share] = values
        return told

    def _metrics(self, tensors: dict[str, NDArray[np.floating]], split: str) -> dict[str, float]:
        """Return the metrics of the server's tensors on all rows of a split."""
        told = self._facts(tensors, split, range(len(self.data.corpus.splits[split])))
        return self.task.metrics({name: float(values.mean()) for name, values in told.items()})

    def _look(self, server_round: int, tensors: dict[str, NDArray[np.floating]]) -> dict[str, Any]:
        """Return what clients' own models come to on the rows that they hold out.

        Under DP clients do not tell the server. In a simulation the rows are here, and the researcher may look; what is
        seen is outside the guarantee.
        """
        packs = split_packs(sorted(self.strategy.have_trained), self.config.engine.pack, len(self.pool))
        roles = self.strategy.all_roles(server_round + 1)
        requests = [Instruction(server_round + 1, pack, roles, tensors) for pack in packs]
        parts = self.pool.results(lambda worker, request: worker.evaluate_personal(request), requests)
        self.strategy.personal_sums = {one.client: sums_of(one) for part in parts for one in part}
        return dict(self.strategy.personal_means())

    def _sparsity(self, tensors: dict[str, NDArray[np.floating]]) -> float | None:
        """Return the share of zeros among the server's tensors that have an L1 weight; None where there is none."""
        sparse = [tensors[name] for name, spec in self.description.specs.items() if spec.l1 and name in tensors]
        return float(np.mean(np.concatenate([value.ravel() for value in sparse]) == 0)) if sparse else None

    def _on_round(self, server_round: int, arrays: ArrayRecord, result: Result) -> None:
        """Write a round's lines and checkpoint, and print its progress."""
        if server_round == 0:
            return
        now = time.monotonic()
        tally = self.strategy.tally
        assert tally is not None, "a round leaves a tally"
        measured = dict(result.evaluate_metrics_serverapp.get(server_round, MetricRecord()))
        personal = dict(result.evaluate_metrics_clientapp.get(server_round, MetricRecord()))
        if self.plan.privacy is not None and self.strategy.has_personal:
            personal = self._look(server_round, from_named_arrays(arrays))
        clients = personal.pop("personal_clients", None)
        means = {name.removeprefix("personal_"): float(value) for name, value in personal.items()}  # type: ignore[arg-type]
        own = self.task.metrics(means) if means else {}
        names = self.task.metric_names
        train = result.train_metrics_clientapp[server_round]
        self._write_privacy()
        line: dict[str, Any] = {
            "round": server_round,
            **{f"{where}_{name}": measured.get(f"{where}_{name}") for where in ("test", "dev") for name in names},
            **{f"personal_{name}": own.get(name) for name in names},
            "personal_clients": clients,
            "head": str(self.strategy.all_roles(server_round).get("head", "none")),
            "train_loss": train.get("train_loss"),
            **self._spent(),
            "clients_ok": train["clients_ok"],
            "clients_refused": train["clients_refused"],
            "bytes_up": tally.bytes_up,
            "bytes_down": tally.bytes_down,
            "bytes_down_cached": tally.bytes_down_cached,
            "sparsity": self._sparsity(from_named_arrays(arrays)),
            "message_bytes_up": tally.message_bytes_up,
            "message_bytes_down": tally.message_bytes_down,
            "seconds": now - self.round_started,
        }
        self.round_started = now
        self.metrics.append(line)
        self.folder.append("metrics.jsonl", line)
        self.folder.append(
            "clients.jsonl",
            *(
                {"round": server_round, "client": client, **facts, "refused": tally.refused.get(client)}
                for client, facts in sorted(tally.facts.items())
            ),
        )
        state = {
            "strategy": self.strategy.name,
            "have_trained": sorted(self.strategy.have_trained),
            "knows": sorted(self.strategy.knows.items()),
            "ledger_heads": sorted(self.strategy.ledger_heads.items()),
            "spent": sorted(self.strategy.spent),
            "base": self.description.digest,
            "packing": self._packing(),
            "before": self.before,
            "seconds": now - self.started,
        }
        self.folder.checkpoint(server_round, from_named_arrays(arrays), state)
        value = line[self.plan.measure]
        left = (self.config.rounds - server_round) * line["seconds"]
        self.console.print(
            f"round {server_round}/{self.config.rounds}  {self.plan.measure.replace('_', ' ')} "
            f"{'-' if value is None else f'{value:.4f}'}  {self._told(line)}  "
            f"{line['clients_ok']} ok, {line['clients_refused']} refused  up {human_bytes(line['bytes_up'])}  "
            f"down {human_bytes(line['bytes_down'])}  {line['seconds']:.1f} s"
            + (f", {human_time(left)} left" if left >= 60 else "")
        )
        self._tell_faults(server_round)

    def _told(self, line: dict[str, Any]) -> str:
        """Return what a round's line says beside its measure: the training loss; under DP, which hides it, epsilon."""
        if self.plan.privacy is None:
            return f"train loss {line['train_loss']:.4f}"
        outside = f"({OUTSIDE})  " if self._is_outside(self.plan.measure) else ""
        return f"{outside}epsilon {told_epsilon(line['epsilon'])} at delta {self.config.privacy.delta:g}"

    def _tell_faults(self, server_round: int) -> None:
        """Print what clients under DP noted and did not tell: the researcher may look, outside the guarantee."""
        if self.plan.privacy is None:
            return
        for client in self.strategy.sample(server_round):
            for line in self.accounts.noted(client, server_round):
                if line["error"]:
                    self.console.print(f"note: client {client}, not told to the server: {line['error']}", markup=False)

    # -- after the rounds ---------------------------------------------------------------------------------

    def _finish(self, tensors: dict[str, NDArray[np.floating]]) -> dict[str, Any]:
        """Measure what is measured once, export, compare, and write the outcome."""
        last = self.metrics[-1]
        if last["round"] < self.config.rounds:
            self.console.print(
                f"stopped after round {last['round']} of {self.config.rounds}: privacy budgets are spent"
            )
        outcome: dict[str, Any] = {
            "head": last["head"],
            **self.before,
            **{
                name: last[name]
                for name in last
                if name.startswith(("test_", "dev_", "personal_")) and last[name] is not None
            },
        }
        if self.plan.measured == "dev" and self.config.eval.test:
            final = self._metrics(tensors, "test")
            outcome |= {f"test_{name}": value for name, value in final.items()}
        if self.plan.privacy is not None and self.strategy.has_personal and not self.strategy.personal_sums:
            self._look(last["round"], tensors)  # a run that was continued after its last round
        scores = self._scores(tensors)
        if scores:
            self.folder.write_lines("scores.jsonl", scores)
            outcome |= summarise(scores, self.task.measure.name, self.task.measure.higher_is_better)
        if self.task.measure.name == "accuracy":
            measured = self.data.corpus.splits.get("test") or self.data.corpus.splits["dev"]
            outcome["majority_share"] = self.data.corpus.majority_share(measured)
        if self.plan.privacy is not None:
            outcome |= self._spent()
            outcome |= {"delta": self.config.privacy.delta, "noise_multiplier": self.config.privacy.noise_multiplier}
            outcome["guarantee"] = self.privacy["guarantee"]
        self._export(tensors, outcome)
        told = read_strengths(self.folder.path)
        ranks = effective_ranks(told)
        outcome |= {
            "effective_rank": float(ranks.mean()),
            "effective_rank_least": float(ranks.min()),
            "effective_rank_most": float(ranks.max()),
            "zero_components": zero_share(told),
            "trained_parameters": self.plan.trained_parameters(),
        }
        if self.config.eval.baselines:
            outcome |= run_baselines(self._federated(), self._run_one, self._score_alone, self.console)
        outcome |= {
            "rounds": last["round"],
            "bytes_up": int(np.sum([line["bytes_up"] for line in self.metrics])),
            "bytes_down": int(np.sum([line["bytes_down"] for line in self.metrics])),
            "bytes_down_cached": int(np.sum([line["bytes_down_cached"] for line in self.metrics])),
            **self._to_target(),
            "seconds": time.monotonic() - self.started,
        }
        self.folder.write_json("result.json", outcome)
        run = Run.read(self.folder.path)
        write_report(run)
        self.console.print(metrics_table(run))
        self.console.print(outcome_table(run))
        if self.plan.privacy is not None:
            self.console.print(f"privacy: {self.privacy['guarantee']}", markup=False)
        self.console.print(f"run folder: {self.folder.path}", markup=False)
        self.console.print(f"next: fedlora report {self.folder.path}", markup=False)
        for line in self._next():
            self.console.print(f"      {line}", markup=False)
        return outcome

    def _federated(self) -> Federated:
        """Return what baselines need to know of this run."""
        return Federated(
            config=self.config,
            data=self.data,
            folder=self.folder.path,
            rounds=self.metrics[-1]["round"],
            examples=self.plan.examples(self.metrics[-1]["round"]),
            steps=self.plan.privacy.mechanism.steps if self.plan.privacy is not None else None,
            frozen=frozenset(self.strategy.all_roles(1)) - self.strategy.trained_kinds,
        )

    def _run_one(self, config: Config, data: FederatedData, frozen: frozenset[str]) -> dict[str, Any]:
        return self.session.run(config, Console(quiet=True), data, frozen)

    def _score_alone(
        self, config: Config, frozen: frozenset[str], clients: Sequence[int], split: str
    ) -> list[dict[str, Any]]:
        """Return the metrics of clients' own models, at the end of a run without exchange, on all rows of a split."""
        pool = self.session.assigned(config, self.data)
        roles = build_strategy(config, self.description.specs, frozen).all_roles(1)
        packs = split_packs(clients, config.engine.pack, len(pool))
        items = [(Instruction(config.rounds + 1, pack, roles, {}), split) for pack in packs]
        parts = pool.results(lambda worker, item: worker.evaluate_personal(*item), items)
        return [self.score(one.client, sums_of(one)) for part in parts for one in part]

    def _to_target(self) -> dict[str, int | None]:
        """Return the rounds and bytes until the measure first reached ``eval.target``; None where it never did."""
        target = self.config.eval.target
        if not target:
            return {}
        sign = 1 if self.task.measure.higher_is_better else -1
        measured = {line["round"]: line[self.plan.measure] for line in self.metrics}
        reached = [n for n, value in measured.items() if value is not None and sign * value >= sign * target]
        names = ("bytes_up", "bytes_down", "bytes_down_cached")
        if not reached:
            return dict.fromkeys(("rounds_to_target", *(f"{name}_to_target" for name in names)))
        until = [line for line in self.metrics if line["round"] <= reached[0]]
        return {
            "rounds_to_target": reached[0],
            **{f"{name}_to_target": sum(line[name] for line in until) for name in names},
        }

    def _next(self) -> list[str]:
        """Return commands that a user may want to type now."""
        file = self.folder.path / "config.toml"
        if self.plan.privacy is not None:  # another strategy would need its privacy keys, more rounds another budget
            return [f"fedlora audit -c {file}"]
        # A smaller rate than FFA-LoRA's: with both factors trained a step moves the product by more.
        other = {"ffa-lora": "'fedavg' train.learning-rate=0.005"}.get(self.config.strategy.name, "'ffa-lora'")
        more = f"run.resume=true rounds={2 * self.config.rounds}"
        return [
            f'fedlora run -c "strategy.name={other}"',
            f'fedlora run -c {file} -c "{more}"',
        ]

    def _scores(self, tensors: dict[str, NDArray[np.floating]]) -> list[dict[str, Any]]:
        """Return each client's metrics on the rows that it holds out, under the model that it ends with."""
        if self.strategy.has_personal:
            sums = self.strategy.personal_sums
            return [self.score(client, sums[client]) for client in sorted(sums)]
        held = [(client, rows) for client, rows in enumerate(self.data.holdout) if len(rows)]
        if not held:
            return []
        told = self._facts(tensors, "train", np.concatenate([rows for _, rows in held]).tolist())
        bounds = np.cumsum([0, *(len(rows) for _, rows in held)])
        return [
            self.score(
                client,
                {"examples": len(rows)}
                | {name: float(values[bounds[at] : bounds[at + 1]].sum()) for name, values in told.items()},
            )
            for at, (client, rows) in enumerate(held)
        ]

    def score(self, client: int, sums: dict[str, float]) -> dict[str, Any]:
        """Return a client's metrics, given the sums of the facts of its rows."""
        examples = sums["examples"]
        means = {name: value / examples for name, value in sums.items() if name != "examples"}
        return {"client": client, "examples": int(examples), **self.task.metrics(means)}

    def _is_outside(self, key: str) -> bool:
        """Return whether a number under DP comes from clients' rows without noise."""
        own = ("clients_", "personal_", "alone_", "central_", "majority_")  # the last: of the commonest training class
        return self.plan.privacy is not None and key.startswith(own)

    def _export(self, tensors: dict[str, NDArray[np.floating]], outcome: dict[str, Any]) -> None:
        """Write the adapter; where clients keep factors of their own, an adapter for each of them."""
        roles = self.strategy.all_roles(self.config.rounds + 1)
        own = any(role is Role.PERSONAL for kind, role in roles.items() if kind != "head")
        clients = sorted(self.strategy.have_trained)[:_ADAPTERS] if own else []
        requests = [Instruction(self.config.rounds + 1, (client,), roles, tensors) for client in clients]
        if requests:
            exported = self.pool.results(lambda worker, request: worker.export_personal(request)[0], requests)
        else:
            requests = [Instruction(self.config.rounds + 1, (), roles, tensors)]
            exported = self.pool.results(lambda worker, tensors: worker.export(tensors), [tensors])
        lines = [
            f"- {key}: {value}" + (f" (of clients' own rows: {OUTSIDE})" if self._is_outside(key) else "")
            for key, value in outcome.items()
        ]
        for request, files in zip(requests, exported, strict=True):
            name = f"adapters/client-{request.clients[0]}" if request.clients else "adapter"
            card = model_card(
                self.config,
                self.data.corpus.classes,
                lines,
                roles,
                self.privacy,
                self.metrics[-1]["round"],
                request.clients,
            )
            for file, content in {**files, "README.md": card.encode()}.items():
                self.folder.write_bytes(f"{name}/{file}", content)
        trainers = [asdict(described) for described in self.pool.everywhere(lambda worker, _: worker.describe())]
        kept = ("device", "threads", "pid", "base_loads", "digest")
        self.folder.write_json("trainers.json", [{key: trainer[key] for key in kept} for trainer in trainers])
