"""The Flower ClientApp: decodes an instruction, hands it to the site, reduces the updates, encodes the reply.

No row and no model is ever in this process; what comes from the site may leave it.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.ray_site import RaySite, TrainerPool
from clients.site import Site
from fedlora import wire
from fedlora.exact_sum import ExactSum
from fedlora.exchange import ClientReport, Instruction, Update
from fedlora.fingerprint import code_fingerprint

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that this node stands for."""
    instruction = _instruction(message)
    reply = reduce(instruction, _site(context).train(instruction))
    return Message(reply.to_content(), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate each client's own model on the rows that it held out."""
    reply = wire.Reply()
    for report in _site(context).evaluate(_instruction(message)):
        _enter(reply, report, report.reason)
    return Message(reply.to_content(), reply_to=message)


def reduce(instruction: Instruction, updates: Iterable[Update]) -> wire.Reply:
    """Reduce a node's updates to one reply: the update of its only client, or the weighted sum of several."""
    reply = wire.Reply(total=ExactSum())
    for update in updates:
        reason = update.report.reason or _fold(reply, instruction, update)
        _enter(reply, update.report, reason)
    return reply


def _fold(reply: wire.Reply, instruction: Instruction, update: Update) -> str:
    """Take a client's update into the reply, the last place where it is alone; return why not, or ""."""
    if len(instruction.clients) == 1:
        reply.update = update.tensors
        return ""
    assert reply.total is not None, "made by reduce"
    try:
        reply.total.add(update.tensors, update.report.examples if instruction.weights == "examples" else 1)
    except OverflowError as error:
        return str(error)
    return ""


def _enter(reply: wire.Reply, report: ClientReport, reason: str) -> None:
    reply.add(
        report.client,
        examples=report.examples,
        steps=report.steps,
        metrics=report.metrics,
        error=reason,
        ledger_head=report.ledger_head,
    )


def _site(context: Context) -> Site:
    """Return the site whose clients this node stands for: the trainers of the run."""
    return RaySite(TrainerPool.connect(context.run_id), first=int(context.node_config.get("partition-id", 0)))


def _instruction(message: Message) -> Instruction:
    """Read the instruction, and refuse it where this process runs other code than the server."""
    read = wire.Instruction.from_content(message.content)
    own, folders = code_fingerprint()
    if read.fingerprint != own:
        raise RuntimeError(
            f"this client runs other code than the server: it was imported from {folders}. A SuperLink that was "
            "started in another checkout lends its working directory to the clients; end that flower-superlink process "
            "and start the run again from here."
        )
    return Instruction(
        round=read.round,
        clients=read.clients,
        roles=read.roles,
        tensors=read.tensors,
        weights=read.weights,
        fingerprint=read.fingerprint,
        pack=read.pack,
        ledger_heads=read.ledger_heads,
    )
