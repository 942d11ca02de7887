"""Training a pack of clients for a round: start tensors by role, batches, the engine, updates.

Under DP a client's ledger pays before anything is computed, batches are drawn from its own randomness, and only what
the guarantee covers becomes part of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import numpy as np
from numpy.typing import NDArray

from clients.accounts import Accounts
from clients.errors import MemoryShortError, RefusedError
from clients.memory import memory_was_short
from clients.start import VARIATE, StartTensors
from fedlora.config import TrainConfig
from fedlora.data import FederatedData
from fedlora.engine import ClientResult, ClientWork, plan_batches
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.methods import METHODS
from fedlora.privacy.step import PrivateStep
from fedlora.seeded import Seeded

_TRIED_WITH = TrainConfig(learning_rate=0.01)  # made-up rows: any rate that moves a tensor
TrainPack = Callable[..., list[ClientResult]]
"""What trains a pack in place of the model: what an audit puts around :func:`fedlora.engine.train_pack`."""


@final
class Trainer:
    """Trains the clients of one job.

    Args:
        start: What clients start a round with, and where they keep what does not leave.
        data: The clients' rows.
        accounts: The clients' privacy accounts; None without DP.
        train: Trains a pack; None: the model does, on all threads.
    """

    def __init__(
        self, start: StartTensors, data: FederatedData, accounts: Accounts | None, train: TrainPack | None = None
    ) -> None:
        self.start = start
        self.model = start.model
        self.data = data
        self.accounts = accounts
        self.trainable: set[frozenset[str]] = set()
        """Sets of trained tensors that have trained on made-up rows."""
        self._train_pack = self.model.parallel.train if train is None else partial(train, self.model.engine)

    def train(self, instruction: Instruction) -> list[Update]:
        """Train a pack for a round and return what each client sends; personal tensors stay here.

        Raises:
            RefusedError: Under DP, what was sent cannot train, or training failed.
            MemoryShortError: There is too little memory for the pack.
        """
        key, whole = METHODS[self.model.config.method.name].whole_rank(self.model.config)
        if any(not 1 <= rank <= whole for rank in instruction.ranks):
            raise RefusedError(f"the ranks {instruction.ranks} are not all between 1 and {key} = {whole}")
        if any(max(own) >= whole for own in instruction.modules):
            raise RefusedError(f"the instruction names modules beyond {key} = {whole}")
        if self.accounts is not None:
            return self._train_under_dp(instruction, self.accounts)
        seeded, config = Seeded(self.model.config.seed), self.model.config.train
        batches = [
            plan_batches(seeded, instruction.round, client, self.data.training_rows(client), config)
            for client in instruction.clients
        ]
        return [
            self._update(
                instruction,
                result,
                reason=result.error or ("" if result.steps else "it has no training rows"),
                examples=result.examples,
                metrics={"loss": result.loss},
            )
            for result in self.run(instruction, batches)
        ]

    def run(
        self,
        instruction: Instruction,
        batches: Sequence[Sequence[NDArray[np.int64]]],
        private: PrivateStep | None = None,
    ) -> list[ClientResult]:
        """Train on these batches, one sequence a client, and keep nothing.

        Raises:
            MemoryShortError: There is too little memory for the pack.
        """
        try:
            return self._run(instruction, batches, private)
        except Exception as error:
            if not memory_was_short(error):
                raise
        # Here, where what the pack had in memory is held no more.
        raise MemoryShortError(f"there is too little memory to train {len(instruction.clients)} client(s) together")

    def _run(
        self,
        instruction: Instruction,
        batches: Sequence[Sequence[NDArray[np.int64]]],
        private: PrivateStep | None,
    ) -> list[ClientResult]:
        trained, common, works = self.start.trained(instruction), self.start.common(instruction), []
        for client, own in zip(instruction.clients, batches, strict=True):
            works.append(
                ClientWork(
                    client=client,
                    examples=self.model.examples["train"],
                    num_examples=len(self.data.training_rows(client)),
                    batches=own,
                    start=self.start.of(instruction, client, common),
                    server_variate=self.start.server_variate(instruction, client),
                    own_variate=self.start.own_variate(instruction, client),
                    rows=self.data.training_rows(client),
                    fixed=self.start.fixed(instruction, client, common),
                )
            )
        fixed = {name: value for name, value in common.items() if name not in trained | works[0].fixed.keys()}
        return self._train_pack(
            works,
            fixed,
            self.model.config.train,
            private,
            terms=instruction.local,
            shared=frozenset(self.start.sent_up(instruction)),
        )

    def _update(
        self,
        instruction: Instruction,
        result: ClientResult,
        reason: str,
        examples: int = 0,
        metrics: dict[str, float] | None = None,
        ledger_head: str = "",
    ) -> Update:
        """Keep what is the client's own of a result, and return what leaves; where there is a reason, neither."""
        report = ClientReport(
            client=result.client,
            outcome=Outcome.FAILED if reason else Outcome.OK,
            reason=reason,
            examples=examples,
            steps=result.steps,
            metrics=metrics or {},
            ledger_head=ledger_head,
        )
        if reason:
            return Update(report)
        before = self.start.own_variate(instruction, result.client)
        kept = {name: result.tensors[name] for name in self.start.personal(instruction)}
        kept |= {VARIATE + name: result.own_variate[name] for name in before}
        if kept:  # beside what other rounds of a cycle keep: roles may alternate
            stored = self.start.store.load(result.client, instruction.round) or {}
            self.start.store.save(result.client, instruction.round, {**stored, **kept})
        return Update(
            report,
            {name: result.tensors[name] for name in self.start.sent_up(instruction)},
            {VARIATE + name: result.own_variate[name] - value for name, value in before.items()},
        )

    # -- under DP -----------------------------------------------------------------------------------------

    def _train_under_dp(self, instruction: Instruction, accounts: Accounts) -> list[Update]:
        """Pay for the round, train those that may, and send nothing that the guarantee does not cover."""
        if len(instruction.ledger_heads) != len(instruction.clients):
            raise RefusedError("a client under DP trains only for a server that says what it last saw of its ledger")
        if instruction.local.scaffold == 1:
            raise RefusedError(
                "local.option = 1: a client under DP takes no gradient of all its rows, which would leave without "
                "noise; set local.option = 2"
            )
        self._check_trains(instruction)
        updates, paid = [], {}
        for client, ledger_head in zip(instruction.clients, instruction.ledger_heads, strict=True):
            try:
                paid[client] = accounts.charge(client, instruction.round, ledger_head)
            except RefusedError as refused:
                updates.append(Update(ClientReport.failed(client, str(refused), refused.outcome)))
        instruction = instruction.part(tuple(paid))
        try:
            results = self._private_results(instruction, accounts) if paid else []
        except Exception as error:  # its text may quote a row, and its kind may depend on one
            if isinstance(error, MemoryShortError) and len(paid) > 1:
                raise  # it is repeated in smaller packs, and paid for once more
            for client in paid:
                accounts.note(client, instruction.round, {"error": f"{type(error).__name__}: {error}"})
            raise RefusedError("training failed at the site; its own diagnostics.jsonl says why") from None
        for result in results:
            # What the watch saw in rows' gradients stays here; of the tensors, noise included, all may know.
            finite = all(np.isfinite(value).all() for value in result.tensors.values())
            fault = "" if finite else "its tensors are not finite after the round; lower train.learning-rate"
            accounts.note(
                result.client,
                instruction.round,
                {"loss": result.loss, "steps": result.steps, **result.diagnostics, "error": result.error},
            )
            updates.append(self._update(instruction, result, fault, ledger_head=paid[result.client]))
        return sorted(updates, key=lambda update: update.client)

    def _private_results(self, instruction: Instruction, accounts: Accounts) -> list[ClientResult]:
        mechanism = accounts.mechanism
        randoms = [accounts.random(client, instruction.round) for client in instruction.clients]
        batches = [
            mechanism.batches(random, self.data.training_rows(client))
            for client, random in zip(instruction.clients, randoms, strict=True)
        ]
        return self.run(instruction, batches, PrivateStep(mechanism, randoms))

    def _check_trains(self, instruction: Instruction) -> None:
        """Have the watch see two steps on made-up rows: what it sees in real ones must not leave under DP."""
        trained = frozenset(self.start.trained(instruction))
        if trained in self.trainable:
            return
        tensors, examples = self.start.common(instruction), self.model.engine.task.made_up_rows()
        start = {name: value for name, value in tensors.items() if name in trained}
        common = {name: value for name, value in tensors.items() if name not in trained}
        work = ClientWork(0, examples, len(examples), [np.arange(len(examples))] * 2, start)
        error = self._train_pack([work], common, _TRIED_WITH)[0].error
        if error:
            raise RefusedError(error)
        self.trainable.add(trained)
