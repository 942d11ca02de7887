"""The Flower ClientApp: decodes an instruction, hands it to the site, reduces the updates, encodes the reply.

No row and no model is ever in this process; what comes from the site may leave it.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.ray_site import RaySite, TrainerPool
from clients.site import Site
from fedlora import plugins, wire
from fedlora.exchange import Instruction
from fedlora.reduce import fold

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that this node stands for."""
    instruction = _instruction(message, context)
    reports, reduction = fold(instruction, _site(context).train(instruction))
    return Message(wire.Reply(reports, reduction).to_content(), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate each client's own model on the rows that it held out."""
    reports = list(_site(context).evaluate(_instruction(message, context)))
    return Message(wire.Reply(reports).to_content(), reply_to=message)


def _site(context: Context) -> Site:
    """Return the site whose clients this node stands for: the trainers of the run."""
    return RaySite(TrainerPool.connect(context.run_id), first=int(context.node_config.get("partition-id", 0)))


def _instruction(message: Message, context: Context) -> Instruction:
    """Read the instruction, and refuse it where this process runs other code than the server."""
    instruction = wire.read_instruction(message.content)
    names = str(context.run_config.get("run.plugins", ""))
    plugins.load(names)
    own, folders = plugins.fingerprint(names)
    if instruction.fingerprint != own:
        raise RuntimeError(
            f"this client runs other code than the server: it was imported from {folders}. A SuperLink that was "
            "started in another checkout lends its working directory to the clients; end that flower-superlink process "
            "and start the run again from here."
        )
    return instruction
