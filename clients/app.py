"""The Flower ClientApp: decodes a message, hands it to trainers, encodes the answer."""

from __future__ import annotations

from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.pool import TrainerLostError, TrainerPool, split_packs
from clients.site import WITHHELD, SiteError
from clients.trainer import Request, Update
from fedlora.exact_sum import ExactSum
from fedlora.fingerprint import code_fingerprint
from fedlora.wire import Instruction, Reply

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that this node stands for."""
    instruction = _instruction(message)
    reply = Reply(total=ExactSum())
    for clients, outcome in _call("train", instruction, context):
        if isinstance(outcome, Exception):
            _refuse(reply, clients, outcome)
            continue
        for update in outcome:
            error = (
                update.error or ("" if update.steps else "it has no training rows") or _fold(reply, instruction, update)
            )
            metrics = {} if update.loss is None else {"loss": update.loss}
            reply.add(
                update.client,
                examples=update.examples,
                steps=update.steps,
                metrics=metrics,
                error=error,
                ledger_head=update.ledger_head,
            )
    return Message(reply.to_content(), reply_to=message)


def _fold(reply: Reply, instruction: Instruction, update: Update) -> str:
    """Take a client's update into the reply, where it is last seen alone; return why not, or ""."""
    if len(instruction.clients) == 1:
        reply.update = update.tensors
        return ""
    assert reply.total is not None, "made by train"
    try:
        reply.total.add(update.tensors, update.examples if instruction.weights == "examples" else 1)
    except OverflowError as error:
        return str(error)
    return ""


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate each client's own model on the rows that it held out."""
    reply = Reply()
    for clients, outcome in _call("answer_evaluation", _instruction(message), context):
        if isinstance(outcome, Exception):
            _refuse(reply, clients, outcome)
            continue
        for client, sums in zip(clients, outcome, strict=True):
            examples = int(sums.pop("examples"))
            reply.add(client, examples=examples, metrics=sums)
    return Message(reply.to_content(), reply_to=message)


def _instruction(message: Message) -> Instruction:
    """Read the instruction, and refuse it where this process runs other code than the server."""
    instruction = Instruction.from_content(message.content)
    own, folders = code_fingerprint()
    if instruction.fingerprint != own:
        raise RuntimeError(
            f"this client runs other code than the server: it was imported from {folders}. A SuperLink that was "
            "started in another checkout lends its working directory to the clients; end that flower-superlink process "
            "and start the run again from here."
        )
    return instruction


def _call(method: str, instruction: Instruction, context: Context) -> list[tuple[tuple[int, ...], Any]]:
    """Cut the clients into packs, have the trainers work on all of them, return (pack, outcome) pairs."""
    pool = TrainerPool.connect(context.run_id)
    packs = split_packs(instruction.clients, instruction.pack, len(pool))
    requests = [(request_of(instruction, clients),) for clients in packs]
    node = int(context.node_config.get("partition-id", 0))
    return list(zip(packs, pool.call(method, requests, first=node), strict=True))


def request_of(instruction: Instruction, clients: tuple[int, ...]) -> Request:
    """Return a pack's part of an instruction; what the server does not say, of ledgers, is not made up."""
    ledger_heads = (
        dict(zip(instruction.clients, instruction.ledger_heads, strict=True)) if instruction.ledger_heads else {}
    )
    known = tuple(ledger_heads[client] for client in clients if ledger_heads)
    return Request(instruction.round, clients, instruction.roles, instruction.tensors, known)


def _refuse(reply: Reply, clients: tuple[int, ...], error: Exception) -> None:
    """Enter a pack that failed as a whole; only words that the site wrote for the server leave."""
    reason = str(error) if isinstance(error, SiteError | TrainerLostError) else WITHHELD
    for client in clients:
        reply.add(client, error=reason)
